"""GPTQ against the paper's formulas: the inverse of what is left of the Hessian, computed anew for each column."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki.compression.quantize.gptq import GPTQ
from niwaki.compression.quantize.integers import FixedGrid
from niwaki.errors import ConfigError
from niwaki.weights import links


def correlated(count: int, width: int) -> Tensor:
    return torch.randn(count, width) @ (torch.eye(width) + 0.4 * torch.randn(width, width))


def quantized(linear: nn.Linear, inputs: Tensor, **fields: Any) -> FixedGrid:
    stage = GPTQ(**fields)
    statistic = stage.statistic(inputs[:20]) + stage.statistic(inputs[20:])
    with torch.no_grad():
        stage.quantize({"it": linear}, statistic, None)  # type: ignore[arg-type]
    (grid,) = links(linear)
    assert isinstance(grid, FixedGrid)
    return grid


def by_hand(weight: Tensor, inputs: Tensor, bits: int, group: int | None, symmetric: bool, act_order: bool) -> Tensor:
    """The values that weights get, in float64, one row and one column after the other."""
    weight, inputs = weight.double().clone(), inputs.double()
    rows, width = weight.shape
    hessian = 2 * inputs.T @ inputs
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(width))
    hessian = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64))[order][:, order]
    group = group or width

    def grid(values: list[float]) -> tuple[float, int, int, int]:
        if symmetric:
            q = 2 ** (bits - 1) - 1
            return max(map(abs, values)) / q, 0, -q, q
        low, high, least = min(0.0, *values), max(0.0, *values), -(2 ** (bits - 1))
        scale = (high - low) / (2**bits - 1)
        return scale, round(least - low / scale), least, -least - 1

    grids = {
        (i, g): grid(weight[i, g * group : (g + 1) * group].tolist())
        for i in range(rows)
        for g in range(width // group)
    }
    zeros, result = weight == 0, torch.zeros_like(weight)
    for step, j in enumerate(order):
        inverse = torch.linalg.inv(hessian[step:, step:])
        for i in range(rows):
            if group < width and not act_order and j % group == 0:
                grids[i, j // group] = grid(weight[i, j : j + group].masked_fill(zeros[i, j : j + group], 0.0).tolist())
            scale, zero, least, last = grids[i, j // group]
            code = zero if zeros[i, j] else min(max(round(float(weight[i, j]) / scale + zero), least), last)
            result[i, j] = (code - zero) * scale
            error = (weight[i, j] - result[i, j]) / inverse[0, 0]
            weight[i, order[step:]] -= error * inverse[0]
    return result


@pytest.mark.parametrize("columns", [128, 7])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "act_order"),
    [(4, None, True, False), (3, 8, True, False), (3, 8, False, False), (2, 8, False, True), (4, None, False, True)],
)
def test_the_codes_are_those_of_the_paper(
    bits: int, group: int | None, symmetric: bool, act_order: bool, columns: int
) -> None:
    linear, inputs = nn.Linear(24, 6), correlated(60, 24)
    with torch.no_grad():
        linear.weight[2, 5], linear.weight[4, 9:12] = 0.0, 0.0
    weight = linear.weight.detach().clone()
    grid = quantized(linear, inputs, bits=bits, group=group, symmetric=symmetric, act_order=act_order, columns=columns)
    expected = by_hand(weight, inputs, bits, group, symmetric, act_order)
    torch.testing.assert_close(grid(weight).double(), expected, rtol=1e-4, atol=1e-5)
    assert bool((grid(weight)[weight == 0] == 0).all())
    assert int(grid.codes.min()) >= grid.layout.lowest
    assert int(grid.codes.max()) <= grid.layout.highest


def test_the_output_is_nearer_than_that_of_the_nearest_codes() -> None:
    """By what the paper gains: at 3 bits the error of the outputs falls by far more than a tenth."""
    linear, inputs = nn.Linear(64, 32), correlated(500, 64)
    weight = linear.weight.detach().clone()
    errors = []
    for gain in (GPTQ, None):
        other = nn.Linear(64, 32)
        other.weight.data.copy_(weight)
        if gain:
            found = quantized(other, inputs, bits=3, group=32)(weight)
        else:
            grouped = weight.view(32, 2, 32)
            scale = grouped.abs().amax(-1, keepdim=True) / 3
            found = ((grouped / scale).round() * scale).view(32, 64)
        errors.append(float(((found - weight) @ inputs.T).square().sum()))
    assert errors[0] < 0.8 * errors[1]


def test_inputs_that_are_never_there_break_nothing() -> None:
    linear, inputs = nn.Linear(16, 4), correlated(40, 16)
    inputs[:, 3] = 0.0
    found = quantized(linear, inputs, bits=4, group=None)(linear.weight)
    assert bool(found.isfinite().all())


def test_without_any_input_each_weight_gets_its_nearest_code() -> None:
    linear = nn.Linear(16, 4)
    weight = linear.weight.detach().clone()
    found = quantized(linear, torch.zeros(40, 16), bits=4, group=None)(weight)
    scale = weight.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(found, (weight / scale).round() * scale)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_what_is_pruned_stays_so_where_the_others_errors_would_bring_it_back(
    act_order: bool, symmetric: bool, group: int | None
) -> None:
    """At 8 bits a code is finer than what the columns before it leave to a weight that is zero."""
    inputs, found = correlated(60, 24), []
    start = torch.randn(6, 24)
    gone = torch.rand(6, 24) < 0.5
    for least in (0.0, 1e-12):  # what is not quite zero is no pruned weight
        linear = nn.Linear(24, 6)
        linear.weight.data.copy_(start.masked_fill(gone, least))
        grid = quantized(linear, inputs, bits=8, group=group, symmetric=symmetric, act_order=act_order)
        found.append(grid(start))
    assert not found[0][gone].any()
    assert float((found[1][gone] != 0).float().mean()) > 0.02


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"damping": 0.0}, "damping=0.0: needs a number above 0"), ({"columns": 0}, "columns=0: needs a whole"),
        ({"rows": 0}, "rows=0: needs a whole"), ({"bits": 9}, "bits=9: needs a whole number from 2 to 8"),
        ({"group": 1}, "group=1: needs null or"), ({"targets": ["head"]}, "targets="),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.gptq\.{said}"):
        GPTQ(**fields)
