"""LoHa against its formula: a product of two low-rank matrices has the rank of neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from niwaki.tuning.delta import adapters
from niwaki.tuning.loha import LoHa


def test_the_formula_entry_by_entry(setting: Callable[..., Any]) -> None:
    one = setting()
    tuning = LoHa(rank=2, alpha=3.0)
    tuning.prepare(one.model, one.context())
    for _, found in adapters(one.model):
        layer: Any = found
        layer.hada_w2_b["default"].data.normal_()
        weight = layer.get_base_layer().weight
        a1, b1, a2, b2 = (getattr(layer, f"hada_{n}")["default"] for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
        merged = tuning.merged(layer, weight)
        for i, j in ((0, 0), (3, 17), (31, 5)):
            first = a1[i, 0] * b1[0, j] + a1[i, 1] * b1[1, j]
            second = a2[i, 0] * b2[0, j] + a2[i, 1] * b2[1, j]
            assert torch.allclose(merged[i, j], weight[i, j] + 1.5 * first * second, atol=1e-6)
        assert torch.allclose(merged - weight, layer.get_delta_weight("default"), atol=1e-6)


def test_its_rank_is_the_square(setting: Callable[..., Any]) -> None:
    one = setting()
    tuning = LoHa(rank=3, alpha=300.0, parts=["query"])
    tuning.prepare(one.model, one.context())
    layer: Any = next(layer for _, layer in adapters(one.model))
    layer.hada_w2_b["default"].data.normal_()
    delta = tuning.merged(layer, torch.zeros(32, 32)).detach()
    assert int(torch.linalg.matrix_rank(delta, rtol=1e-4)) == 9
