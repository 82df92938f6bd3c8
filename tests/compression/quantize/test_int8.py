"""Post-training int8 on models: stacked after the fit, stored as bytes, close to the model it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.weights import fold


def quantized(one: Any, *before: Any) -> Any:
    context = one.context()
    for stage in (*before, Int8()):
        stage.prepare(one.model, context)
    one.model.eval()
    context.records.update(fold(context.targets))
    return Int8().finalize(one.model, context)


def test_it_acts_after_the_fit() -> None:
    assert not Int8.during_fit


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_every_target_holds_absmax_codes(setting: Callable[..., Any], family: str, task: str) -> None:
    one, plain = setting(family, task), setting(family, task)
    (edit,) = quantized(one)
    dense = plain.context().targets
    assert list(edit.modules) == list(dense)
    for name, linear in dense.items():
        integer = one.model.get_submodule(name)
        assert isinstance(integer, IntegerLinear)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        assert torch.allclose(integer.scale, scale, rtol=1e-6)
        assert torch.equal(integer.codes.float(), (linear.weight / integer.scale).round())
        assert torch.equal(integer.bias, linear.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_the_outputs_stay_close(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    plain = one.logits()
    quantized(one)
    difference = float((one.logits() - plain).abs().max())
    assert 0 < difference <= 0.02 * float(plain.abs().max() + plain.std())


def test_pruned_weights_stay_pruned(setting: Callable[..., Any]) -> None:
    one = setting()
    quantized(one, Magnitude(pattern="2:4"))
    for module in one.model.modules():
        if isinstance(module, IntegerLinear):
            assert int((module.codes.view(-1, 4) != 0).sum(1).max()) <= 2
