"""GPTQ: rounding with error compensation, column after column (Frantar et al. 2022, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.calibration import cholesky_of_inverse
from niwaki.compression.quantize.integers import FixedGrid
from niwaki.compression.quantize.layout import Layout, values_of
from niwaki.compression.quantize.post_training import CalibratedGrid, Grouped
from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.weights import stack


@dataclass(frozen=True, kw_only=True)
class GPTQ(Grouped, CalibratedGrid):
    """With H = 2 X^T X + damping * mean(diag) * I: what rounding column j leaves, e = (w_j - q_j) / [H^-1]_jj, the
    columns that are not rounded yet make up for by w -= e [H^-1]_j:, with H^-1 of those alone.

    The grid of a group is drawn from its weights when it is reached. `act_order`: the columns with the largest diagonal
    of H first, on grids that are drawn from the weights as they were, so that a group stays where it is. `columns`: the
    updates beyond these wait and are done at once. A weight that is zero stays so, and its column's error goes on; no
    grid is drawn wider for it. An input that is 0 in all rows has its weights rounded to the nearest; the authors' code
    sets them to zero.
    """

    paper: ClassVar[str] = "Frantar et al. 2022, arXiv:2210.17323"

    damping: float = 0.01
    act_order: bool = False
    columns: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < 1:
            raise ConfigError(f"{self.field}.damping={self.damping}: needs a number above 0 and below 1")
        if self.columns < 1:
            raise ConfigError(f"{self.field}.columns={self.columns}: needs a whole number of at least 1")

    def statistic(self, values: Tensor) -> Tensor:
        return values.T @ values

    def quantize(self, linears: Mapping[str, nn.Linear], statistic: Tensor, context: Context) -> None:
        order = statistic.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        hessian = statistic if order is None else statistic[order][:, order]
        factor = cholesky_of_inverse(2 * hessian, self.damping)
        for linear in linears.values():
            stack(linear, rounded(linear.weight.detach(), factor, self.layout, self.columns, order))


def rounded(
    weight: Tensor, factor: Tensor, layout: Layout, columns: int = 128, order: Tensor | None = None
) -> FixedGrid:
    """The integers that GPTQ finds for a weight (out, in), from U of `cholesky_of_inverse`; with `order`, columns are
    taken in that one, and `factor` is of H in it."""
    width = weight.shape[1]
    group = layout.group or width
    first, offset = layout.grid_of(layout.grouped(weight))  # of a whole channel, and of groups that stay in place
    scale = first[..., 0].to(factor.dtype)
    zero = None if offset is None else offset[..., 0].to(factor.dtype)
    drawn_on_the_way = bool(layout.group) and order is None
    places = torch.arange(width, device=weight.device) if order is None else order
    left, zeros = weight[:, places].to(factor.dtype), weight[:, places] == 0
    codes = torch.empty_like(left)
    step = max(columns // group, 1) * group if drawn_on_the_way else columns
    for start in range(0, width, step):
        stop = min(start + step, width)
        part, inverse, errors = left[:, start:stop], factor[start:stop, start:stop], []
        for column in range(stop - start):
            place = int(places[start + column]) // group
            if drawn_on_the_way and (start + column) % group == 0:
                nothing_there = zeros[:, start + column : start + column + group]
                drawn, middle = layout.grid_of(part[:, column : column + group].masked_fill(nothing_there, 0.0))
                scale[:, place] = drawn[:, 0]
                if zero is not None and middle is not None:
                    zero[:, place] = middle[:, 0]
            now, size = part[:, column], scale[:, place]
            nothing = torch.zeros_like(now) if zero is None else zero[:, place]
            offset = None if zero is None else nothing
            chosen = layout.codes_of(now, size, offset).to(now.dtype).where(~zeros[:, start + column], nothing)
            codes[:, start + column] = chosen
            error = (now - values_of(chosen, size, offset).to(now.dtype)) / inverse[column, column]
            part[:, column:] -= error[:, None] * inverse[column, column:]
            errors.append(error)
        left[:, stop:] -= torch.stack(errors, 1) @ factor[start:stop, stop:]
    found = torch.empty_like(codes)
    found[:, places] = codes
    return FixedGrid(layout, found, scale.float(), None if zero is None else zero.float())
