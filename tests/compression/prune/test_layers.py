"""Layer pruning: block influence against the paper's formula in plain loops, choices by place, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki import compose
from niwaki.compression.prune.layers import Layers, by_number, influences
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import KeepBlocks
from niwaki.model.tiny import Tiny
from niwaki.pipeline import check_on_empty_model
from niwaki.task.classification import Classification


def cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_influence_is_one_minus_the_mean_cosine(setting: Callable[..., Any], family: str) -> None:
    """From the hidden states that transformers gives; padding counts nowhere."""
    one = setting(family)
    anatomy, batch = Anatomy.of(one.model), one.batch()
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        for number, block in enumerate(anatomy.blocks):  # of different influence
            for parameter in block.parameters():
                parameter.mul_(1 + 2 * number)
        inputs = one.task.inputs(batch)
        states = one.model.eval()(**inputs, output_hidden_states=True).hidden_states
    found = influences(anatomy, [batch, batch], one.context())
    assert list(found) == [name for name, _, _ in anatomy.named_blocks()]
    assert len(found) == 3
    last = 2 if family == "modernbert" else 3  # whose last state is behind a final norm
    for number, score in enumerate(list(found.values())[:last]):
        cosines = [
            cosine(states[number][row, place].tolist(), states[number + 1][row, place].tolist())
            for row in range(len(batch["input_ids"]))
            for place in range(int(batch["attention_mask"][row].sum()))
        ]
        assert score == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-5)


def test_every_position_weighs_the_same_over_batches(setting: Callable[..., Any]) -> None:
    one = setting()
    short, long = one.batch({"text": ["x"], "label": ["no"]}), one.batch({"text": ["the garden"], "label": ["no"]})
    apart = [influences(Anatomy.of(one.model), [batch], one.context()) for batch in (short, long)]
    sizes = [int(batch["attention_mask"].sum()) for batch in (short, long)]
    together = influences(Anatomy.of(one.model), [short, long], one.context())
    for name, score in together.items():
        expected = sum(found[name] * size for found, size in zip(apart, sizes, strict=True)) / sum(sizes)
        assert score == pytest.approx(expected, abs=1e-9)


def test_the_least_influential_block_goes(setting: Callable[..., Any]) -> None:
    """A block whose sublayers write nothing has no influence where norms stand before the sublayers."""
    one = setting("llama")
    block = one.model.model.layers[1]
    with torch.no_grad():
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.zero_()
            linear.bias.zero_()
    expected, context = one.logits(), one.context()
    effects = Layers(count=2).prepare(one.model, context)
    assert effects.edits == [KeepBlocks(blocks=[0, 2])]
    assert torch.allclose(one.logits(), expected, atol=1e-6)
    assert one.model.config.num_hidden_layers == 2
    scores = context.facts["block_influence"]
    assert scores["model.layers.1"] == pytest.approx(0, abs=1e-9)
    assert min(scores["model.layers.0"], scores["model.layers.2"]) > 1e-4


def test_training_mode_and_rows_are_as_they_were(setting: Callable[..., Any]) -> None:
    one = setting()
    one.model.train()
    asked: list[int] = []
    context = one.context()
    context.calibration = lambda count: asked.append(count) or [one.batch()]  # type: ignore[func-returns-value]
    Layers(rows=7).prepare(one.model, context)
    assert asked == [7]
    assert one.model.training
    assert not any(block._forward_hooks for block in Anatomy.of(one.model).blocks)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"by": "every_other"}, [0, 2]), ({"by": "first"}, [0, 1]), ({"by": "first", "count": 1}, [0]),
        ({"by": "last"}, [1, 2]), ({"by": "list", "blocks": [2, 0]}, [2, 0]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("family", "task"), [("bert", "classification"), ("llama", "causal_lm"), ("bart", "classification")]
)
def test_choices_by_place(
    setting: Callable[..., Any], family: str, task: str, fields: dict[str, Any], kept: list[int]
) -> None:
    one = setting(family, task)
    stacks = [list(Anatomy.of(one.model).blocks_of(stack)) for stack in Anatomy.of(one.model).stacks]
    Layers(**fields).prepare(one.model, one.context())
    anatomy = Anatomy.of(one.model)
    assert [list(anatomy.blocks_of(s)) for s in anatomy.stacks] == [[blocks[i] for i in kept] for blocks in stacks]
    assert torch.isfinite(one.logits()).all()


def test_an_encoder_and_a_decoder_count_alike(setting: Callable[..., Any]) -> None:
    anatomy = Anatomy.of(setting("bart").model)
    found = {name: float(i) for i, (name, _, _) in enumerate(anatomy.named_blocks())}
    assert by_number(anatomy, found) == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("family", ["t5", "modernbert"])
def test_a_first_block_that_has_to_stay_does(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    layers = Layers(count=1)
    assert layers.chosen(Anatomy.of(one.model), [0.0, 0.5, 0.9]) == [0]
    assert Layers(count=2).chosen(Anatomy.of(one.model), [0.0, 0.5, 0.9]) == [0, 2]
    with pytest.raises(
        ConfigError, match=r"^compression\.prune_layers\.by=last: .* needs 0 as the first, since block 0"
    ):
        Layers(by="last").check(Anatomy.of(one.model), {})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"by": "random"}, "by"), ({"by": "list"}, "blocks"), ({"blocks": [0]}, "blocks"), ({"count": 0}, "count"),
        ({"rows": 0}, "rows"), ({"by": "first", "rows": 5}, "rows"), ({"by": "every_other", "count": 2}, "count"),
        ({"by": "list", "blocks": [0], "count": 1}, "count"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.prune_layers\.{name}="):
        Layers(**fields)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bert", {"count": 3}, r"count=3: the model has 3 blocks; needs fewer"),
        ("bert", {"by": "list", "blocks": [0, 1, 2]}, r"blocks: leaves out none of the 3 blocks"),
        ("bert", {"by": "list", "blocks": [0, 5]}, r"by=list: .* needs different layer numbers in 0\.\.2"),
        ("bert", {"by": "list", "blocks": []}, r"by=list: .* needs different layer numbers"),
        ("albert", {}, r"by=influence: all layers of an albert share their blocks"),
    ],
)
def test_refusals_on_the_empty_model(family: str, fields: dict[str, Any], message: str) -> None:
    anatomy = Anatomy.of(Tiny(name=family).empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=rf"^compression\.prune_layers\.{message}") as caught:
        Layers(**fields).check(anatomy, {})
    assert "\n" not in str(caught.value)


def test_both_ways_to_leave_blocks_out() -> None:
    with pytest.raises(ConfigError, match=r"^model\.layers=\[0\] and prune/layers: both say which blocks stay"):
        compose.build(compose.compose(["model=tiny-bert", "model.layers=[0]", "compression=[prune/layers]"]).config)


def test_later_methods_are_checked_on_what_is_left() -> None:
    settings = ["model=tiny-bert", "compression=[prune/layers]", "compression.prune_layers.count=1", "tuning=top"]
    recipe = compose.build(compose.compose(settings).config)
    with pytest.raises(ConfigError, match=r"tuning\.blocks=2: this model has 1"):
        check_on_empty_model(recipe, ("a", "b"))
