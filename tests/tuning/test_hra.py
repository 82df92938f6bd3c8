"""HRA: a chain of reflections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from niwaki.tuning.delta import adapters
from niwaki.tuning.hra import HRA


def test_the_formula_reflection_by_reflection(setting: Callable[..., Any]) -> None:
    one = setting()
    tuning = HRA(rank=4)
    tuning.prepare(one.model, one.context())
    for _, found in adapters(one.model):
        layer: Any = found
        u = layer.hra_u["default"]
        assert torch.equal(u[:, 0], u[:, 1])
        assert torch.equal(u[:, 2], u[:, 3])
        u.data.normal_()
        weight = layer.get_base_layer().weight
        chain = torch.eye(len(u))
        for column in range(4):
            unit = u[:, column].detach() / u[:, column].detach().norm()
            chain = chain @ (torch.eye(len(u)) - 2 * torch.outer(unit, unit))
        merged = tuning.merged(layer, weight).detach()
        assert torch.allclose(merged, weight @ chain, atol=1e-5)
        assert torch.allclose(merged @ merged.T, weight @ weight.T, atol=1e-5)  # lengths and angles stay
        assert float((merged - weight).abs().max()) > 1e-2
