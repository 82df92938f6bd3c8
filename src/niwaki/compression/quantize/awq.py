"""Activation-aware weight quantization (Lin et al. 2023, arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.quantize.factors import Factored
from niwaki.compression.quantize.layout import Layout, values_of
from niwaki.compression.quantize.post_training import Grouped, nearest, with_codes
from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.weights import stack


@dataclass
class Inputs:
    """What is added up of what enters a linear: X^T X, the sums of |x| by channel, and how many tokens."""

    gram: Tensor
    sizes: Tensor
    count: Tensor

    def __add__(self, other: Inputs) -> Inputs:
        return Inputs(self.gram + other.gram, self.sizes + other.sizes, self.count + other.count)


@dataclass(frozen=True, kw_only=True)
class AWQ(Grouped, Factored):
    """Q(W diag(s)) diag(1/s) with s = mean|x|^a for each input channel, over sqrt(max s min s): of `steps` values of a
    from 0 up, below 1, the one with the least ||(Q - W) X||^2, for all linears together that read the same.

    `clip`: then the ends of each group's grid are drawn in, down to half, where that lowers the same error of the group
    alone; not of queries and keys, as in the authors' code. They measure the error of s behind the whole attention or
    feed-forward; here it is that of the formula. The factors 1/s go into what comes before the linears, or are
    multiplied with the input of each.
    """

    paper: ClassVar[str] = "Lin et al. 2023, arXiv:2306.00978"

    steps: int = 20
    clip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"{self.field}.steps={self.steps}: needs a whole number of at least 1")

    def statistic(self, values: Tensor) -> Inputs:
        return Inputs(values.T @ values, values.abs().sum(0), torch.tensor(len(values), device=values.device))

    def factor(self, linears: Mapping[str, nn.Linear], statistic: Inputs) -> Tensor:
        mean = (statistic.sizes / statistic.count).clamp(min=1e-4)
        weights = [linear.weight.detach().float() for linear in linears.values()]
        return 1 / self.best_scales(weights, mean, statistic.gram)

    def put(
        self, linears: Mapping[str, nn.Linear], statistic: Inputs, factor: Tensor, context: Context, *,
        at_run_time: bool,
    ) -> None:  # fmt: skip
        gram = statistic.gram * factor[:, None] * factor
        compared = context.anatomy.part_names(("query", "key"))  # or the layer that stands in place of one
        for name, linear in linears.items():
            scaled = self.layout.grouped(linear.weight.detach().float() / factor)
            clips = self.clip and not any(f"{name}.".startswith(f"{place}.") for place in compared)
            grid = drawn_in(scaled, gram, self.layout) if clips else self.layout.grid_of(scaled)
            own = factor if at_run_time else None
            stack(linear, with_codes(linear.weight.shape, self.layout, scaled, *grid, factor=own))

    def best_scales(self, weights: list[Tensor], mean: Tensor, gram: Tensor) -> Tensor:
        """s of the least error, (in,), of the mean |x| of each input (in,) and X^T X."""
        best, least = torch.ones_like(mean), torch.inf
        for step in range(self.steps):
            scales = mean ** (step / self.steps)
            scales = scales / (scales.max() * scales.min()).sqrt()
            error = sum(
                output_error(nearest(weight, self.layout, 1 / scales)(weight) - weight, gram) for weight in weights
            )
            if error < least:
                best, least = scales, error
        return best


def output_error(difference: Tensor, gram: Tensor) -> float:
    """||D X||^2 from X^T X, of a difference of weights (out, in)."""
    return float(((difference @ gram) * difference).sum())


def drawn_in(grouped: Tensor, gram: Tensor, layout: Layout, steps: int = 10) -> tuple[Tensor, Tensor | None]:
    """The grid (out, groups, 1) of the least error of each group by itself, of those whose ends are drawn in by up to a
    half. `gram`: of the inputs of `grouped` (out, groups, inputs of a group)."""
    size = grouped.shape[-1]
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])
    best_scale, best_zero = layout.grid_of(grouped)
    least = torch.full_like(best_scale, torch.inf)
    ends = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    for step in range(steps):
        share = 1 - 0.5 * step / steps
        clipped = torch.minimum(torch.maximum(grouped, ends[0] * share), ends[1] * share)
        scale, zero = layout.grid_of(clipped)
        difference = values_of(layout.codes_of(grouped, scale, zero), scale, zero) - grouped
        error = (torch.einsum("ogi,gij->ogj", difference, blocks) * difference).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
    return best_scale, best_zero
