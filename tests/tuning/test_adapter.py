"""Houlsby's adapters: where they stand, how many parameters they have, what learns, and where they start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.bottleneck import bottlenecks, ends

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "classification"), ("llama", "causal_lm")]
NORMS = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
}
PLACES = {"bert": ("attention.output.dense", "output.dense"), "llama": ("self_attn.o_proj", "mlp.down_proj")}


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize(("fields", "m"), [({"size": 8}, 8), ({"size": None, "reduction": 4}, 8), ({"size": 5}, 5)])
def test_the_count_of_the_paper(
    setting: Callable[..., Any], grown: Callable[..., Any], family: str, task: str, fields: dict[str, Any], m: int
) -> None:
    one = setting(family, task)
    before = sum(p.numel() for p in one.model.parameters())
    d, blocks = 32, 3
    context = grown(one, Houlsby(**fields, norms=False))
    assert sum(p.numel() for p in one.model.parameters()) - before == blocks * 2 * (2 * m * d + d + m)
    head = {id(p) for p in context.anatomy.head_parameters().values()} if context.head_learns else set()
    learning = [p for p in one.model.parameters() if p.requires_grad and id(p) not in head]
    assert sum(p.numel() for p in learning) == blocks * 2 * (2 * m * d + d + m)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize(("family", "activation"), [("bert", "gelu"), ("bert", "silu"), ("llama", "gelu")])
def test_it_stands_behind_both_sublayers_before_residual_and_norm(
    setting: Callable[..., Any], grown: Callable[..., Any], bottleneck_by_hand: Any, block_by_hand: Callable[..., Any],
    family: str, activation: str, index: int,
) -> None:  # fmt: skip
    one = setting(family)
    grown(one, Houlsby(size=6, activation=activation), random=True)
    inside = list(bottlenecks(one.model, "default").values())[2 * index : 2 * index + 2]
    f = getattr(functional, activation)
    plain, hand = block_by_hand(one, index)
    assert not torch.allclose(plain, hand, atol=1e-3)
    attention, feed = (lambda y, *_, a=a: y + bottleneck_by_hand(a, y, f) for a in inside)
    real, hand = block_by_hand(one, index, attention, feed)
    assert torch.allclose(real, hand, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_blocks_by_hand_are_those_of_the_library(
    setting: Callable[..., Any], block_by_hand: Callable[..., Any], family: str
) -> None:
    real, hand = block_by_hand(setting(family), 1)
    assert torch.allclose(real, hand, atol=1e-6)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_it_starts_near_the_base_and_at_it_without_noise(
    setting: Callable[..., Any], grown: Callable[..., Any], family: str, task: str
) -> None:
    base = setting(family, task).logits()
    for settings, bound in (({}, 1e-5), ({"init_std": 0.0}, 0.0)):
        one = setting(family, task)
        grown(one, Houlsby(**settings))
        assert float((one.logits() - base).abs().max()) <= bound
        if settings:
            assert all(bool(b.down.weight.any()) for b in bottlenecks(one.model, "default").values())


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_only_bottlenecks_norms_and_a_new_head_move(
    setting: Callable[..., Any], grown: Callable[..., Any], train: Callable[..., Any],
    family: str, task: str, norms: bool,
) -> None:  # fmt: skip
    one = setting(family, task)
    context = grown(one, Houlsby(size=4, norms=norms, init_std=0.01))
    head = {id(p) for p in context.anatomy.head_parameters().values()} if context.head_learns else set()
    expected = {n for n, p in one.model.named_parameters() if ".adapter.default." in n or id(p) in head}
    if norms:
        expected |= {n for n, _ in one.model.named_parameters() if n.rpartition(".")[0].endswith(NORMS[family])}
        assert len(expected) >= 3 * 2 * (4 + len(NORMS[family]) // 2)
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(steps=3), [one.batch()] * 3)
    assert {n for n, p in one.model.named_parameters() if bool((p != before[n]).any())} == expected
    in_blocks = [n for n in expected if "embeddings" in n or n.endswith("model.norm.weight")]
    assert not in_blocks


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_weight_methods_see_base_and_adapter(
    setting: Callable[..., Any], grown: Callable[..., Any], family: str, task: str
) -> None:
    one = setting(family, task)
    bare = list(one.context().targets)
    context = grown(one, Houlsby(size=4))
    expected = []
    for name in bare:
        ends_here = name.endswith(PLACES[family])
        expected += [f"{name}.linear"] if ends_here else [name]
        expected += [f"{name}.adapter.default.{part}" for part in ("down", "up") if ends_here]
    assert list(context.targets) == expected
    assert all(one.model.get_submodule(name) is linear for name, linear in context.targets.items())


def test_a_wrapper_looks_like_its_linear(setting: Callable[..., Any], grown: Callable[..., Any]) -> None:
    one = setting()
    grown(one, Houlsby(size=4))
    for _, end in ends(one.model):
        assert end.weight is end.linear.weight
        assert end.bias is end.linear.bias
        assert (end.in_features, end.out_features) == (end.linear.in_features, end.linear.out_features)


def test_the_start_follows_the_seed_alone(setting: Callable[..., Any], grown: Callable[..., Any]) -> None:
    def start(noise: int, seed: int = 0) -> dict[str, Tensor]:
        one = setting()
        torch.manual_seed(noise)
        Houlsby().grow(one.model, one.context().anatomy)
        context = one.context()
        context.seed = seed
        Houlsby().prepare(one.model, context)
        return {n: p.detach() for n, p in one.model.named_parameters() if ".adapter." in n}

    first, again, other = start(1), start(2), start(1, seed=1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if n.endswith("weight"))
    matrices = [first[n] for n in first if n.endswith("down.weight")]
    assert len({float(m[0, 0]) for m in matrices}) == len(matrices)
    flat = torch.cat([m.flatten() for m in matrices])
    assert float(flat.abs().max()) <= 0.02
    assert float(flat.std()) == pytest.approx(0.01 * 0.8796, rel=0.02)  # of a normal that is cut off at two deviations


def test_dropout_inside_while_training_only(setting: Callable[..., Any], grown: Callable[..., Any]) -> None:
    one = setting()
    grown(one, Houlsby(size=8, dropout=0.5), random=True)
    inputs = one.task.inputs(one.batch())
    one.model.train()
    assert not torch.equal(one.model(**inputs).logits, one.model(**inputs).logits)
    assert torch.equal(one.logits(), one.logits())
