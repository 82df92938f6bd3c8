"""Shared layers: every block runs with the weights of its group; there once in optimizer, masks, integers and file."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from niwaki import adapters, artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.share.layers import Layers
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import Pretrained
from niwaki.model.repeated import ShareBlocks
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.task.classification import Classification
from niwaki.tuning.lora import LoRA
from niwaki.weights import fold, links

KINDS = [(family, "classification") for family in FAMILIES if family != "albert"]
KINDS += [(family, "causal_lm") for family in ("llama", "qwen3", "gpt2", "bart")]


def blocks_of(model: Any) -> list[list[Any]]:
    """As they are before anything is shared, by stack."""
    anatomy = Anatomy.of(model)
    return [list(anatomy.blocks_of(stack)) for stack in anatomy.stacks]


def save(place: Path, one: Any, edits: list[Any], config: dict[str, Any]) -> artifact.Artifact:
    artifact.save(
        place, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels, base_config=config,
        edits=edits,
    )  # fmt: skip
    return artifact.load(place)


def test_groups_by_number(setting: Callable[..., Any]) -> None:
    anatomy = Anatomy.of(setting(overrides={"num_hidden_layers": 7}).model)
    assert Layers().grouped(anatomy) == [[0, 1, 2, 3, 4, 5, 6]]
    # ALBERT's own rule: int(i / (layers / groups))
    groups = [[i for i in range(7) if int(i / (7 / 3)) == group] for group in range(3)]
    assert Layers(groups=3).grouped(anatomy) == groups == [[0, 1, 2], [3, 4], [5, 6]]
    assert Layers(groups=3, arrangement="cyclic").grouped(anatomy) == [[0, 3, 6], [1, 4], [2, 5]]
    assert Layers(lists=[[4, 1], [2, 3]]).grouped(anatomy) == [[1, 4], [2, 3]]


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize("start", ["first", "average"])
def test_it_computes_what_blocks_with_copies_of_the_weights_do(
    setting: Callable[..., Any], family: str, task: str, start: str, tmp_path: Path
) -> None:
    """Independently: the model with all its own blocks, into which the same weights are copied."""
    one = setting(family, task)
    copies, config = copy.deepcopy(one.model), one.model.config.to_dict()
    lowest = 1 if family in ("t5", "modernbert") else 0
    for blocks in blocks_of(copies):
        members = [dict(block.named_parameters()) for block in blocks[lowest:]]
        with torch.no_grad():
            for name in members[0]:
                value = sum(m[name] for m in members) / len(members) if start == "average" else members[0][name].clone()
                for member in members:
                    member[name].copy_(value)
    edits = Anatomy.of(one.model).family.edits(one.model.config)
    edits += Layers(start=start).prepare(one.model, one.context()).edits  # type: ignore[arg-type]
    assert torch.allclose(one.logits(), one.logits(copies), atol=1e-6)
    saved = save(tmp_path / "model", one, edits, config)
    assert torch.equal(one.logits(saved.model), one.logits())
    of_block = sum(p.numel() for block in blocks_of(copies) for p in block[-1].parameters())
    repeats = (3 - lowest) - 1
    whole = sum(tensor.numel() for tensor in artifact.unique_tensors(copies).values())
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / artifact.WEIGHTS).values())
    assert stored == whole - repeats * of_block


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bart"])
def test_a_language_model_writes_the_same_with_a_cache(setting: Callable[..., Any], family: str) -> None:
    """The cache finds its layers by their number, which each use has of its own."""
    one = setting(family, "causal_lm")
    Layers().prepare(one.model, one.context())
    ids = one.tokenizer("a tree in the garden", return_tensors="pt", add_special_tokens=False)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        start = one.model(input_ids=ids[:, :-1], use_cache=True)
        assert len(start.past_key_values.layers) == 3
        stepped = one.model(input_ids=ids[:, -1:], past_key_values=start.past_key_values)
        assert torch.allclose(stepped.logits[0, -1], one.model(input_ids=ids).logits[0, -1], atol=1e-5)
    assert torch.equal(one.model.generate(ids, **settings), one.model.generate(ids, use_cache=False, **settings))


def test_windows_of_attention_stay_those_of_each_use(setting: Callable[..., Any]) -> None:
    """ModernBERT's blocks look at the whole text or at a window, in turns."""
    turns = ["full_attention", *["sliding_attention", "full_attention"] * 2]
    one = setting("modernbert", overrides={"num_hidden_layers": 5, "layer_types": turns})
    layers = one.model.model.layers
    kinds = [layer.attention_type for layer in layers]
    windows = [layer.attn.sliding_window for layer in layers]
    assert len(set(kinds[1:])) == 2
    Layers().prepare(one.model, one.context())
    seen = []
    hook = one.model.model.layers._modules["1"].attn.register_forward_pre_hook(
        lambda module, _: seen.append(module.sliding_window)
    )
    one.logits()
    hook.remove()
    assert seen == windows[1:]
    assert [layer.attention_type for layer in one.model.model.layers] == kinds


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "classification"), ("gpt2", "causal_lm"), ("llama", "causal_lm")]
)
def test_masks_integers_and_adapters_are_on_the_one_set(
    setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str, tmp_path: Path
) -> None:
    one = setting(family, task)
    config = one.model.config.to_dict()
    context = one.context()
    edits = [*Anatomy.of(one.model).family.edits(one.model.config), *Layers().prepare(one.model, context).edits]
    tuning, mask, grid = LoRA(rank=2), Magnitude(), QAT(bits=4)
    context.targets = Anatomy.of(one.model).linears()
    assert len(context.targets) == len(setting(family, task).context().targets) / 3
    tuning.prepare(one.model, context)
    adapted = [name for name, _ in one.model.named_parameters() if "lora_A" in name]
    assert len(adapted) == len(context.targets)
    tuning.link(one.model, context)
    effects = [stage.prepare(one.model, context) for stage in (mask, grid)]
    train(one.learner(effects=effects), [one.batch()] * 3)
    assert all(len(links(linear)) == 3 for linear in context.targets.values())
    stacked = one.logits()
    context.records.update(fold(context.targets))
    assert torch.equal(one.logits(), stacked)
    for stage in (tuning, mask, grid):
        edits += stage.finalize(one.model, context)
    assert torch.allclose(one.logits(), stacked, atol=0.02)
    saved = save(tmp_path / "model", one, edits, config)
    assert torch.equal(one.logits(saved.model), one.logits())
    for name in context.targets:
        integer: Any = saved.model.get_submodule(name)
        assert isinstance(integer, IntegerLinear)
        assert int((integer.dequantized() == 0).sum()) >= integer.in_features * integer.out_features // 2
    stored = load_file(tmp_path / "model" / artifact.WEIGHTS)
    assert len([name for name in stored if name.endswith(".codes")]) == len(context.targets)


def test_the_gradient_is_the_sum_over_the_uses(setting: Callable[..., Any]) -> None:
    one = setting()
    copies = copy.deepcopy(one.model)
    for blocks in blocks_of(copies):
        for block in blocks[1:]:
            block.load_state_dict(blocks[0].state_dict())
    Layers().prepare(one.model, one.context())
    for model in (one.model, copies):
        one.task.loss(model.eval()(**one.task.inputs(one.batch())), one.batch()).backward()
    shared = dict(blocks_of(one.model)[0][0].named_parameters())
    assert len(blocks_of(one.model)[0]) == 1
    own = [dict(block.named_parameters()) for block in blocks_of(copies)[0]]
    for name, parameter in shared.items():
        assert torch.allclose(parameter.grad, sum(member[name].grad for member in own), atol=1e-6)  # type: ignore[arg-type, union-attr]


def test_a_fresh_process_and_another_training_have_them_shared(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("llama", "causal_lm")
    config = one.model.config.to_dict()
    edits = Layers().prepare(one.model, one.context()).edits
    save(tmp_path / "model", one, edits, config)
    torch.save({"inputs": one.task.inputs(one.batch()), "logits": one.logits()}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); from niwaki import artifact\n"
        "stored = torch.load(sys.argv[1] + '/expected.pt', weights_only=True)\n"
        "with torch.inference_mode(): found = artifact.load(sys.argv[1] + '/model').model(**stored['inputs']).logits\n"
        "assert torch.equal(found, stored['logits']); print('same')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr[-2000:]
    again = Pretrained(name=str(tmp_path / "model"))
    model = again.load(one.task, one.labels, 0)
    assert again.carried() == edits
    assert torch.equal(one.logits(model), one.logits())
    assert len(Anatomy.of(again.empty(one.task, one.labels)).blocks) == 1
    with pytest.raises(ConfigError, match=r"^model\.layers=\[0\]: blocks of this model share their weights"):
        Pretrained(name=str(tmp_path / "model"), layers=[0]).empty(one.task, one.labels)
    with pytest.raises(ConfigError, match=r"^compression\.share_layers: the blocks of this model share their"):
        Layers().check(Anatomy.of(model), {})


def test_an_adapter_beside_a_shared_base_goes_on_it_again(setting: Callable[..., Any], tmp_path: Path) -> None:
    """Two adapters of one base: each knows the base by its fingerprint."""
    said = {}
    for seed, name in ((1, "one"), (2, "two")):
        one = setting("gpt2", "causal_lm")
        config, context = one.model.config.to_dict(), one.context()
        edits = [*Anatomy.of(one.model).family.edits(one.model.config), *Layers().prepare(one.model, context).edits]
        tuning = LoRA(rank=2, merge=False)
        tuning.prepare(one.model, context)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in one.model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        edits += tuning.finalize(one.model, context)
        saved = save(tmp_path / name, one, edits, config)
        said[name] = one.logits()
        assert torch.equal(one.logits(saved.model), said[name])
    other = adapters.load_with(tmp_path / "one", str(tmp_path / "two"))
    assert not torch.equal(said["one"], said["two"])
    assert torch.equal(one.logits(other.model), said["two"])


def test_what_is_set_for_each_use_is_what_differs(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    ShareBlocks(groups=[[0, 2]]).apply(one.model)
    layers = one.model.model.layers
    assert layers.settings == [{"self_attn": {"layer_idx": 0}}, {}, {"self_attn": {"layer_idx": 2}}]
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    assert [layer.self_attn.layer_idx for layer in layers[1:]] == [1, 2]
    assert json.loads(json.dumps(ShareBlocks(groups=[[0, 2]]).to_json()))["groups"] == [[0, 2]]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"groups": 0}, "groups"), ({"arrangement": "cyclic"}, "arrangement"), ({"start": "last"}, "start"),
        ({"groups": 2, "arrangement": "random"}, "arrangement"), ({"lists": []}, "lists"), ({"lists": [[0]]}, "lists"),
        ({"lists": [[0, 1], [1, 2]]}, "lists"), ({"lists": [[0, 1]], "groups": 2}, "groups"),
        ({"lists": [[0, 1]], "arrangement": "cyclic"}, "arrangement"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.share_layers\.{name}="):
        Layers(**fields)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bert", {"groups": 3}, r"\.groups=3: the model has 3 blocks that can share; needs fewer groups"),
        ("t5", {"groups": 2}, r"\.groups=2: the model has 2 blocks that can share"),
        ("bert", {"lists": [[0, 3]]}, r"\.lists=\[\[0, 3\]\]: needs block numbers in 0\.\.2"),
        ("t5", {"lists": [[0, 1]]}, r"\.lists=\[\[0, 1\]\]: needs 0 on its own, since block 0 of a t5"),
        ("albert", {}, r": the blocks of this model share their weights already"),
    ],
)
def test_refusals_on_the_empty_model(family: str, fields: dict[str, Any], message: str) -> None:
    anatomy = Anatomy.of(Tiny(name=family).empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=rf"^compression\.share_layers{message}") as caught:
        Layers(**fields).check(anatomy, {})
    assert "\n" not in str(caught.value)


def test_blocks_of_other_shapes_are_refused(setting: Callable[..., Any]) -> None:
    one = setting()
    one.model.bert.encoder.layer[1].intermediate.dense = torch.nn.Linear(32, 48)
    with pytest.raises(ConfigError, match=r"blocks 0 and 1 differ in the shape of intermediate\.dense\.bias"):
        Layers().check(Anatomy.of(one.model), {})
