"""Ternary and binary weights by hand, in chains, and in the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.binary import Binary
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.signs import SignGrid
from niwaki.compression.quantize.ternary import Ternary
from niwaki.errors import ConfigError
from niwaki.stage import refuse_conflicts
from niwaki.weights import fold


def test_ternary_by_hand() -> None:
    # mean|w| = 1, d = 0.7: of 2, -1.5, 0.3, -0.2 the first two stay, a = 1.75
    weight = torch.tensor([[2.0, -1.5, 0.3, -0.2], [0.0, 0.0, 0.0, 0.0]])
    assert SignGrid(Ternary())(weight).tolist() == [[1.75, -1.75, 0.0, 0.0], [0.0] * 4]
    # groups of two: mean 1.75, both stay; mean 0.25, d = 0.175, both stay
    grouped = SignGrid(Ternary(group=2))(weight[:1])
    assert grouped.tolist()[0] == pytest.approx([1.75, -1.75, 0.25, -0.25])


def test_the_threshold_of_ternary_by_hand() -> None:
    # mean|w| = 1: 0.72 stays, 0.68 does not
    weight = torch.tensor([[2.0, -0.72, 0.68, 0.6], [-2.0, 0.68, 0.72, -0.6]])
    assert SignGrid(Ternary())(weight).flatten().tolist() == pytest.approx([1.36, -1.36, 0, 0, -1.36, 0, 1.36, 0])


def test_binary_by_hand() -> None:
    weight = torch.tensor([[2.0, -1.5, 0.3, -0.2], [0.0, 0.0, 0.0, -4.0]])
    assert SignGrid(Binary())(weight).tolist() == [[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, -1.0]]


def test_the_ternary_of_the_paper_is_near_the_best_of_all() -> None:
    """a and d by a search over all thresholds, on normal weights: within a percent of its error."""
    row = torch.randn(4000)
    sizes, _ = row.abs().sort(descending=True)
    best = min(float(row.square().sum() - sizes[:k].sum() ** 2 / k) for k in range(1, 4000, 7))
    found = SignGrid(Ternary())(row[None])[0]
    assert float((row - found).square().sum()) < 1.01 * best


@pytest.mark.parametrize(
    "stage", [Ternary(), Ternary(group=8, activation_bits=None), Binary(), Binary(group=16)], ids=str
)
@pytest.mark.parametrize(("family", "task"), [("bert", "ner"), ("llama", "causal_lm")])
def test_what_is_stored_is_what_was_trained(
    setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str, stage: Any
) -> None:
    one = setting(family, task)
    context = one.context()
    stage.prepare(one.model, context)
    before = one.logits()
    train(one.learner(), [one.batch()] * 3)
    trained = one.logits()
    assert not torch.allclose(trained, before, atol=1e-4)
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    assert torch.allclose(one.logits(), trained, atol=1e-5)
    for name in context.targets:
        module: Any = one.model.get_submodule(name)
        assert isinstance(module, IntegerLinear)
        assert set(module.integers().unique().tolist()) <= ({-1, 0, 1} if stage.bits == 2 else {-1, 1})
        assert module.codes.numel() == -(-module.in_features * module.out_features * stage.bits // 8)


def test_the_gradient_passes() -> None:
    weight = torch.randn(3, 8, requires_grad=True)
    upstream: Tensor = torch.randn(3, 8)
    SignGrid(Ternary())(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)  # type: ignore[arg-type]


def test_pruned_weights_stay_zero_or_are_refused(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    for stage in (Magnitude(sparsity=0.8), Ternary()):
        stage.prepare(one.model, context)
    fold(context.targets)
    assert all(float((linear.weight == 0).float().mean()) >= 0.79 for linear in context.targets.values())
    with pytest.raises(ConfigError, match=r"prune/magnitude and quantize/binary: a pruned weight would not stay zero"):
        refuse_conflicts([Magnitude(), Binary()])


@pytest.mark.parametrize(("fields", "said"), [({"group": 1}, "group=1"), ({"activation_bits": 9}, "activation_bits=9")])
def test_refusals(fields: dict[str, Any], said: str) -> None:
    for kind in (Ternary, Binary):
        with pytest.raises(ConfigError, match=rf"^compression\.{kind.__name__.lower()}\.{said}: needs"):
            kind(**fields)
