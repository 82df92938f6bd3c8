"""OFT: blocks rotate, and angles between the neurons stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.tuning.delta import adapters
from niwaki.tuning.oft import OFT


def layer_of(one: Any, tuning: OFT, scale: float) -> Any:
    tuning.prepare(one.model, one.context())
    layer: Any = next(layer for _, layer in adapters(one.model))
    layer.oft_R["default"].weight.data.normal_(std=scale)
    return layer


@pytest.mark.parametrize("share", [False, True])
def test_the_formula_block_by_block(setting: Callable[..., Any], share: bool) -> None:
    tuning = OFT(block=4, terms=None, share_blocks=share, parts=["query"])
    layer = layer_of(setting(), tuning, 0.5)
    values = layer.oft_R["default"].weight
    assert tuple(values.shape) == (1 if share else 8, 6)
    weight = layer.get_base_layer().weight
    merged = tuning.merged(layer, weight)
    upper = torch.triu_indices(4, 4, 1)
    for block in range(8):
        skew = torch.zeros(4, 4)
        skew[upper[0], upper[1]] = values[0 if share else block].detach()
        skew = skew - skew.T
        rotation = (torch.eye(4) - skew) @ torch.linalg.inv(torch.eye(4) + skew)
        inputs = slice(4 * block, 4 * block + 4)
        assert torch.allclose(merged[:, inputs], weight[:, inputs] @ rotation.T, atol=1e-5)


@pytest.mark.parametrize(("terms", "scale", "bound"), [(None, 1.0, 1e-5), (5, 0.01, 1e-5)])
def test_lengths_and_angles_of_the_neurons_stay(
    setting: Callable[..., Any], terms: int | None, scale: float, bound: float
) -> None:
    tuning = OFT(block=8, terms=terms, parts=["query"])
    layer = layer_of(setting(), tuning, scale)
    weight = layer.get_base_layer().weight
    merged = tuning.merged(layer, weight).detach()
    assert float((merged - weight).abs().max()) > 1e-4
    assert torch.allclose(merged @ merged.T, weight @ weight.T, atol=bound)


def test_a_longer_series_is_nearer_to_the_inverse(setting: Callable[..., Any]) -> None:
    merged = {}
    for terms in (3, 6, None):
        tuning = OFT(block=8, terms=terms, parts=["query"])
        torch.manual_seed(0)
        layer = layer_of(setting(), tuning, 0.05)
        if terms is None:  # PEFT's inverse is that of -Q
            layer.oft_R["default"].weight.data.neg_()
        merged[terms] = tuning.merged(layer, layer.get_base_layer().weight).detach()
    distance = {terms: float((merged[terms] - merged[None]).abs().max()) for terms in (3, 6)}
    assert 0 < distance[6] < distance[3] / 5
