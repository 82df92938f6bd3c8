"""HQQ's search in plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from niwaki.compression.quantize.hqq import HQQ, shrunk
from niwaki.compression.quantize.layout import values_of
from niwaki.errors import ConfigError


def by_hand(weight: list[list[float]], bits: int, steps: int) -> tuple[list[float], list[float]]:
    """(scale, zero) of each row, all of which stop together, when the mean error does not fall."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales, zeros = [], []
    for row in weight:
        least, most = min(0.0, *row), max(0.0, *row)
        scales.append((most - least) / (high - low))
        zeros.append(low - least / scales[-1])
    best, known, beta = list(zeros), math.inf, 10.0
    for _ in range(steps):
        total, moved = 0.0, []
        for row, scale, zero in zip(weight, scales, zeros, strict=True):
            parts = []
            for value in row:
                code = min(max(round(value / scale + zero), low), high)
                error = value - scale * (code - zero)
                total += abs(error)
                size = abs(error) - abs(error) ** (0.7 - 1) / beta if error else 0.0
                kept = math.copysign(max(size, 0.0), error)
                parts.append(code - (value - kept) / scale)
            moved.append(sum(parts) / len(parts))
        if total >= known:
            break
        known, best, zeros, beta = total, list(zeros), moved, beta * 1.01
    return scales, best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_by_hand(bits: int) -> None:
    weight = torch.randn(6, 40).double().pow(3).float() + 0.2
    grid = HQQ(bits=bits, group=None).fixed(weight)
    scales, zeros = by_hand(weight.tolist(), bits, 20)
    assert grid.zero is not None
    assert grid.scale.flatten().tolist() == pytest.approx(scales, rel=1e-4)
    assert grid.zero.flatten().tolist() == pytest.approx(zeros, rel=1e-3, abs=1e-3)


def test_the_proximal_step_is_that_of_the_norm() -> None:
    """sign(x) max(|x| - |x|^(p-1) / beta, 0), by hand: 1 - 1/10; 0.01 goes; p = 1 takes 1/10 off."""
    values = torch.tensor([1.0, -1.0, 0.01, 0.5])
    assert shrunk(values, 10.0, 0.7).tolist() == pytest.approx([0.9, -0.9, 0.0, 0.5 - 0.5**-0.3 / 10], abs=1e-6)
    assert shrunk(values, 10.0, 1.0).tolist() == pytest.approx([0.9, -0.9, 0.0, 0.4], abs=1e-6)


def test_the_mean_error_falls() -> None:
    weight = torch.randn(16, 64).pow(3)
    found = HQQ(bits=3, group=16)
    grouped = found.layout.grouped(weight)
    scale, zero = found.layout.grid_of(grouped)
    plain = values_of(found.layout.codes_of(grouped, scale, zero), scale, zero).view(16, 64)
    assert float((found.fixed(weight)(weight) - weight).abs().mean()) < float((plain - weight).abs().mean())


def test_zeros_stay_where_there_are_some() -> None:
    weight = torch.randn(8, 32) + 0.4
    dense = HQQ(bits=3, group=16).fixed(weight)
    assert dense.zero is not None
    assert not torch.equal(dense.zero, dense.zero.round())
    weight[weight.abs() < 0.3] = 0.0
    assert bool((HQQ(bits=3, group=16).fixed(weight)(weight)[weight == 0] == 0).all())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm": 0.0}, "norm=0.0"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"kappa": 0.9}, "kappa=0.9"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_refusals(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.hqq\.{said}: needs"):
        HQQ(**fields)
