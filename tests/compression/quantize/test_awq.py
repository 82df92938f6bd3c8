"""AWQ by brute force: every exponent on the inputs themselves, every drawn-in grid on the group's own inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki.compression.quantize.awq import AWQ, drawn_in
from niwaki.compression.quantize.integers import FixedGrid
from niwaki.compression.quantize.layout import Layout
from niwaki.errors import ConfigError
from niwaki.weights import links


def nearest(weight: Tensor, group: int, bits: int) -> Tensor:
    """Symmetric rounding to the nearest, (out, in)."""
    grouped, q = weight.view(len(weight), -1, group), 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True) / q
    return ((grouped / scale).round() * scale).view(weight.shape)


def uneven(count: int, width: int) -> Tensor:
    """Inputs of which a few channels are much larger than the others."""
    return torch.randn(count, width) * torch.where(torch.rand(width) < 0.1, 20.0, 1.0)


def quantized(linears: dict[str, nn.Linear], inputs: Tensor, context: Any, **fields: Any) -> dict[str, FixedGrid]:
    stage = AWQ(fold=False, **fields)
    statistic = stage.statistic(inputs[:30]) + stage.statistic(inputs[30:])
    with torch.no_grad():
        stage.quantize(linears, statistic, context)
    return {name: links(linear)[-1] for name, linear in linears.items()}  # type: ignore[misc]


def test_the_scales_are_the_best_of_all_for_both_linears_together(setting: Callable[..., Any]) -> None:
    context, inputs = setting().context(), uneven(80, 32)
    linears = {name: nn.Linear(32, 12, bias=False) for name in ("one", "two")}
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    grids = quantized(linears, inputs, context, bits=3, group=16, clip=False)
    tried = []
    for step in range(20):
        scales = inputs.abs().mean(0) ** (step / 20)
        scales = scales / (scales.max() * scales.min()).sqrt()
        found = {name: nearest(weight * scales, 16, 3) / scales for name, weight in weights.items()}
        tried.append(
            (sum(float(((found[n] - w) @ inputs.T).square().sum()) for n, w in weights.items()), found, scales)
        )
    least, expected, scales = min(tried, key=lambda one: one[0])
    assert least < 0.7 * tried[0][0]
    for name, grid in grids.items():
        torch.testing.assert_close(grid(weights[name]), expected[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grid.factor, 1 / scales, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", ["none", "whole"])
def test_ends_are_drawn_in_where_that_helps_the_group_alone(zero: Any) -> None:
    layout, weight, inputs = Layout(bits=3, group=8, zero=zero), torch.randn(5, 16) ** 3, torch.randn(60, 16)
    grouped = layout.grouped(weight)
    scale, offset = drawn_in(grouped, inputs.T @ inputs, layout)
    for row in range(5):
        for group in range(2):
            part, seen = grouped[row, group], inputs[:, group * 8 : (group + 1) * 8]
            errors = []
            for step in range(10):
                share = 1 - 0.05 * step
                clipped = part.clamp(float(part.min()) * share, float(part.max()) * share)
                size, middle = layout.grid_of(clipped)
                codes = layout.codes_of(part, size, middle)
                values = codes * size if middle is None else (codes - middle) * size
                errors.append((float(((values - part) @ seen.T).square().sum()), float(size)))
            assert float(scale[row, group]) == pytest.approx(min(errors)[1], rel=1e-5)
    assert (offset is None) == (zero == "none")
    assert not torch.allclose(scale, layout.grid_of(grouped)[0])


def test_ends_are_drawn_in_for_the_inputs_times_their_factor(setting: Callable[..., Any]) -> None:
    """Of the scaled weight, by the error of its outputs for what it then reads."""
    linear, inputs = nn.Linear(32, 12, bias=False), torch.randn(80, 32) * torch.logspace(-1, 1, 32)
    weight = linear.weight.detach().clone()
    grid = quantized({"it": linear}, inputs, setting().context(), bits=3, group=16)["it"]
    assert grid.factor is not None
    read, parts = inputs * grid.factor, (weight / grid.factor).view(12, 2, 16)
    assert float(grid.factor.max()) > 1.4 * float(grid.factor.min())
    for row in range(12):
        for group in range(2):
            part, seen = parts[row, group], read[:, group * 16 : (group + 1) * 16]
            tried = []
            for step in range(10):
                size = float(part.abs().max()) * (1 - 0.05 * step) / 3
                values = (part / size).round().clamp(-3, 3) * size
                tried.append((float(((values - part) @ seen.T).square().sum()), size))
            assert float(grid.scale[row, group]) == pytest.approx(min(tried)[1], rel=1e-4)


def test_queries_and_keys_keep_their_ends(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    context = one.context()
    names = [name for name in context.targets if ".layers.0.self_attn." in name][:3]
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "k_proj", "v_proj"]
    inputs, weights = uneven(80, 32), {name: context.targets[name].weight.detach().clone() for name in names}
    grids = quantized({name: context.targets[name] for name in names}, inputs, context, bits=3, group=16)
    for name, grid in grids.items():
        assert grid.factor is not None
        whole = grid.layout.grid_of(grid.layout.grouped(weights[name] / grid.factor))[0][..., 0]
        assert torch.allclose(grid.scale, whole) == (not name.endswith("v_proj"))


def test_zeros_stay(setting: Callable[..., Any]) -> None:
    linear = nn.Linear(32, 8)
    with torch.no_grad():
        linear.weight[linear.weight.abs() < 0.08] = 0.0
    weight = linear.weight.detach().clone()
    for symmetric in (True, False):
        other = nn.Linear(32, 8)
        other.weight.data.copy_(weight)
        grid = quantized({"it": other}, uneven(80, 32), setting().context(), symmetric=symmetric)["it"]
        assert bool((grid(weight)[weight == 0] == 0).all())


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"^compression\.awq\.steps=0: needs a whole number of at least 1"):
        AWQ(steps=0)
