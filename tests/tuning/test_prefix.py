"""Prefix tuning: what learns and how much of it, the MLP against its formula, and whole models against PEFT's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.tuning.prefix import PrefixTuning, prefixes
from niwaki.tuning.prefixed_attention import Prefix

LAYERS, WIDTH = 3, 32
KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "classification"), ("llama", "causal_lm")]
HEADS = {
    ("bert", "classification"): {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    },
    ("bert", "ner"): {"classifier.weight", "classifier.bias"},
    ("llama", "classification"): {"score.weight"},
    ("llama", "causal_lm"): set(),
}  # fmt: skip


def started(one: Any, tuning: PrefixTuning) -> Any:
    """The context, after everything before the fit."""
    context = one.context()
    tuning.grow(one.model, context.anatomy)
    tuning.prepare(one.model, context)
    return context


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_what_learns(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    started(one, PrefixTuning(tokens=5, reparametrize=False))
    of_block = {"bert": "bert.encoder.layer.{}.attention.self", "llama": "model.layers.{}.self_attn"}[family]
    if task != "causal_lm" and family == "llama":
        assert one.model.base_model_prefix == "model"
    own = {f"{of_block.format(i)}.prefix.{part}" for i in range(LAYERS) for part in ("key", "value")}
    assert set(learning(one.model)) == own | HEADS[family, task]


@pytest.mark.parametrize(("family", "heads"), [("bert", 4), ("llama", 2)])
def test_as_many_parameters_as_the_formulas_say(setting: Callable[..., Any], family: str, heads: int) -> None:
    """Saved: 2 n L h d. While it trains through the MLP: n w + w m + m + 2 L h d (m + 1)."""
    n, m, one_side = 5, 7, heads * 8
    task = "ner" if family == "bert" else "causal_lm"
    one = setting(family, task)
    before = sum(p.numel() for p in one.model.parameters())
    context = started(one, PrefixTuning(tokens=n, hidden=m))
    own = [p for name, p in learning(one.model).items() if ".prefix." in name]
    assert sum(p.numel() for p in own) == n * WIDTH + WIDTH * m + m + 2 * LAYERS * one_side * (m + 1)
    PrefixTuning(tokens=n, hidden=m).finalize(one.model, context)
    assert sum(p.numel() for p in one.model.parameters()) - before == 2 * n * LAYERS * one_side


def test_the_mlp_is_the_papers(setting: Callable[..., Any]) -> None:
    """W2 tanh(W1 E + b1) + b2, the same as PEFT's PrefixEncoder with these weights."""
    from peft import PrefixTuningConfig
    from peft.tuners.prefix_tuning import PrefixEncoder

    one = setting("bert", "ner")
    started(one, PrefixTuning(tokens=5, hidden=6))
    theirs = PrefixEncoder(
        PrefixTuningConfig(
            num_virtual_tokens=5,
            token_dim=WIDTH,
            num_layers=LAYERS,
            encoder_hidden_size=6,
            prefix_projection=True,
            num_transformer_submodules=1,
            num_attention_heads=4,
        )
    )
    shared, found = one.model.base_model.prefix, prefixes(one.model)
    theirs.embedding.weight.data = shared.embedding.weight.data
    theirs.transform[0].load_state_dict(shared.linear.state_dict())
    # Theirs are rows of all keys and values in turn; ours of each head, its key and then its value.
    rows = [p.writer.linear for p in found]  # type: ignore[union-attr]
    order = torch.arange(2 * WIDTH).view(4, 2, 8).transpose(0, 1).flatten()
    theirs.transform[2].weight.data = torch.cat([linear.weight[order] for linear in rows])  # type: ignore[index]
    theirs.transform[2].bias.data = torch.cat([linear.bias[order] for linear in rows])  # type: ignore[index]
    expected = theirs(torch.arange(5)).view(5, LAYERS, 2, 4, 8)
    for layer, prefix in enumerate(found):
        for part, written in enumerate(prefix()):
            assert torch.allclose(written, expected[:, layer, part].transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize("reparametrize", [True, False])
def test_only_keys_and_values_are_left_and_the_outputs_stay(
    setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str, reparametrize: bool
) -> None:
    one = setting(family, task)
    plain, plain_names = one.logits(), set(one.model.state_dict())
    tuning = PrefixTuning(tokens=4, reparametrize=reparametrize)
    context = started(one, tuning)
    start = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    train(one.learner(steps=3), [one.batch()] * 3)
    moved = {n for n, p in one.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(learning(one.model))
    trained = one.logits()
    assert not torch.allclose(trained, plain, atol=1e-4)
    assert tuning.finalize(one.model, context) == []
    assert torch.equal(one.logits(), trained)
    left = set(one.model.state_dict()) - plain_names
    assert len(left) == 2 * LAYERS
    assert all(name.endswith((".prefix.key", ".prefix.value")) for name in left)


def test_the_start_follows_the_seed_and_nothing_else_does(setting: Callable[..., Any]) -> None:
    def start(seed: int, drawn: int, reparametrize: bool) -> Tensor:
        one = setting("bert", "ner")
        context = one.context()
        context.seed = seed
        tuning = PrefixTuning(reparametrize=reparametrize)
        tuning.grow(one.model, context.anatomy)
        torch.rand(drawn)
        before = torch.get_rng_state()
        tuning.prepare(one.model, context)
        assert torch.equal(torch.get_rng_state(), before)
        return prefixes(one.model)[1]()[0].detach()

    for reparametrize in (True, False):
        assert torch.equal(start(1, 0, reparametrize), start(1, 9, reparametrize))
        assert not torch.equal(start(1, 0, reparametrize), start(2, 0, reparametrize))


def test_autocast_does_not_reach_the_mlp(setting: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    started(one, PrefixTuning())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        key, value = prefixes(one.model)[0]()
    assert key.dtype == value.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.isfinite(one.model(**one.task.inputs(one.batch())).logits).all()


def of_peft(model: Any, kind: str, own: list[Prefix]) -> Any:
    """PEFT's prefix tuning of `model`, with these keys and values."""
    from peft import PrefixTuningConfig, get_peft_model

    tokens = own[0].sizes[0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(model, PrefixTuningConfig(task_type=kind, num_virtual_tokens=tokens))
    parts = [part for prefix in own for part in (prefix.key, prefix.value)]  # (heads, tokens, width) each
    flat = torch.stack([part.detach().transpose(0, 1) for part in parts if part is not None], dim=1)
    theirs.prompt_encoder["default"].embedding.weight.data = flat.reshape(tokens, -1).clone()
    return theirs.eval()


@pytest.mark.parametrize(
    ("family", "task", "kind"),
    [("bert", "classification", "SEQ_CLS"), ("bert", "ner", "TOKEN_CLS"), ("llama", "causal_lm", "CAUSAL_LM")],
)
def test_the_same_model_as_pefts_where_positions_are_the_same(
    setting: Callable[..., Any], family: str, task: str, kind: str
) -> None:
    """PEFT's text begins at position n, since its prefix stands in the cache; ours at 0, since it stands nowhere."""
    one, twin = setting(family, task), setting(family, task)
    started(one, PrefixTuning(tokens=6, reparametrize=False))
    for prefix in prefixes(one.model):
        prefix.settle(*(torch.randn(size) for size in prefix.sizes))
    theirs = of_peft(twin.model, kind, prefixes(one.model))
    inputs = one.task.inputs(one.batch())
    positions = torch.arange(inputs["input_ids"].shape[1]) + 6
    keep = slice(None) if task == "classification" else inputs["attention_mask"].bool()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(**inputs).logits
        moved = one.model.eval()(**inputs, position_ids=positions.expand_as(inputs["input_ids"])).logits
        found = one.model(**inputs).logits
    assert torch.allclose(moved[keep], expected[keep], atol=1e-5)
    assert not torch.allclose(found[keep], expected[keep], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"tokens": 0}, "tokens"), ({"hidden": 0}, "hidden"), ({"hidden": 8, "reparametrize": False}, "hidden")],
)
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tuning\.{name}="):
        PrefixTuning(**fields)
