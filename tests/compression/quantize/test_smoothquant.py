"""SmoothQuant: the factors by hand, and what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki.compression.quantize.smoothquant import SmoothQuant
from niwaki.errors import ConfigError
from niwaki.weights import links


def quantized(linears: dict[str, nn.Linear], inputs: Tensor, **fields: Any) -> Any:
    stage = SmoothQuant(fold=False, **fields)
    statistic = stage.statistic(inputs[:10]) + stage.statistic(inputs[10:])
    with torch.no_grad():
        stage.quantize(linears, statistic, None)  # type: ignore[arg-type]
    return {name: links(linear)[-1] for name, linear in linears.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_factors_by_hand(alpha: float) -> None:
    linears = {name: nn.Linear(6, 4) for name in ("query", "key")}
    weights = [linear.weight.tolist() for linear in linears.values()]
    inputs = torch.randn(30, 6) * 4
    grids = quantized(linears, inputs, alpha=alpha)
    for grid in grids.values():
        for j in range(6):
            activation = max(abs(row[j]) for row in inputs.tolist())
            weight = max(abs(row[j]) for one in weights for row in one)
            assert float(grid.factor[j]) == pytest.approx(weight ** (1 - alpha) / activation**alpha, rel=1e-4)


def test_large_channels_cost_less() -> None:
    """A linear with outliers in its inputs is nearer to its fp32 self than with 8 bits alone."""
    inputs = torch.randn(200, 64) * torch.where(torch.arange(64) % 16 == 0, 60.0, 1.0)
    errors = []
    for alpha in (0.5, 0.0):
        torch.manual_seed(1)
        linear = nn.Linear(64, 32)
        plain = linear(inputs).detach()
        quantized({"it": linear}, inputs, alpha=alpha)
        if alpha == 0.0:  # the grid of the weight itself, and no factors
            weight, grid = linear.parametrizations["weight"].original.detach(), links(linear)[-1]  # type: ignore[index, union-attr]
            grid.factor.fill_(1.0)  # type: ignore[union-attr, operator]
            grid.scale.copy_(weight.abs().amax(1, keepdim=True) / 127)  # type: ignore[union-attr, operator]
            grid.codes.copy_((weight / grid.scale).round())  # type: ignore[union-attr, operator]
        errors.append(float((linear(inputs).detach() - plain).abs().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"^compression\.smoothquant\.alpha=1\.5: needs a number in 0\.\.1"):
        SmoothQuant(alpha=1.5)
