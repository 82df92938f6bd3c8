"""DoRA against its formula: lengths and directions of rows, and no gradient through the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from niwaki.tuning.delta import adapters
from niwaki.tuning.dora import DoRA


def drawn(one: Any, **fields: Any) -> tuple[DoRA, Any]:
    """The tuning and one of its layers, off its start."""
    tuning = DoRA(rank=2, alpha=3.0, parts=["query"], **fields)
    tuning.prepare(one.model, one.context())
    layer: Any = next(layer for _, layer in adapters(one.model))
    layer.lora_B["default"].weight.data.normal_(std=0.3)
    layer.lora_magnitude_vector["default"].weight.data.mul_(1.5)
    return tuning, layer


def test_magnitudes_start_as_the_norms_of_the_rows(setting: Callable[..., Any]) -> None:
    one = setting()
    DoRA(rank=2, parts=["query"]).prepare(one.model, one.context())
    for _, layer in adapters(one.model):
        norms = layer.get_base_layer().weight.square().sum(1).sqrt()
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, atol=1e-6)  # type: ignore[index, union-attr]


def test_the_formula(setting: Callable[..., Any]) -> None:
    for stabilized, scale in ((False, 3 / 2), (True, 3 / 2**0.5)):
        tuning, layer = drawn(setting(), rank_stabilized=stabilized)
        weight = layer.get_base_layer().weight
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        m = layer.lora_magnitude_vector["default"].weight
        merged = tuning.merged(layer, weight)
        for row in range(3):
            v = weight[row] + scale * (b[row, 0] * a[0] + b[row, 1] * a[1])
            assert torch.allclose(merged[row], m[row] * v / v.dot(v).sqrt(), atol=1e-6)
        assert torch.allclose(merged.norm(dim=1), m, atol=1e-6)  # the length is m's alone


def test_the_norm_is_a_constant_to_the_gradient(setting: Callable[..., Any]) -> None:
    tuning, layer = drawn(setting())
    weight = layer.get_base_layer().weight
    b, scale = layer.lora_B["default"].weight, 3 / 2
    tuning.merged(layer, weight)[0].sum().backward()
    v = weight[0] + scale * b[0] @ layer.lora_A["default"].weight
    m = layer.lora_magnitude_vector["default"].weight[0]
    expected = m / v.norm() * scale * layer.lora_A["default"].weight.sum(1)
    assert torch.allclose(b.grad[0], expected, atol=1e-5)
