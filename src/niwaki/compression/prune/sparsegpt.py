"""SparseGPT: one-shot pruning with error compensation (Frantar & Alistarh 2023, arXiv:2301.00774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.calibration import cholesky_of_inverse
from niwaki.compression.prune.calibration import Calibrated
from niwaki.compression.prune.mask import add_to_base
from niwaki.compression.prune.pattern import Pattern
from niwaki.errors import ConfigError
from niwaki.weights import entering


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Calibrated):
    """With H = 2 X^T X + damping * mean(diag) * I, column after column: what is dropped of column j leaves the error
    e = w_j / [H^-1]_jj, and the columns to its right make up for it by w -= e [H^-1]_j: (H^-1 of what is left, by its
    Cholesky factor). Which weights go is decided for `columns` columns at once, by w^2 / [H^-1]_jj; with N:M for each
    group when it is reached. The update of the weights that stay goes into the base weight.
    """

    paper: ClassVar[str] = "Frantar & Alistarh 2023, arXiv:2301.00774"

    damping: float = 0.01
    columns: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = Pattern.parse(self.pattern)
        if pattern.block:
            raise ConfigError(
                f"{self.field}.pattern={self.pattern}: the columns of a block would be chosen one after the other; "
                "needs unstructured or N:M"
            )
        if not 0 < self.damping < 1:
            raise ConfigError(f"{self.field}.damping={self.damping}: needs a number above 0 and below 1")
        if self.columns < max(pattern.group, 1):
            raise ConfigError(
                f"{self.field}.columns={self.columns}: needs a whole number of at least {max(pattern.group, 1)}"
            )

    @property
    def moves_base(self) -> bool:
        return True

    def statistic(self, values: Tensor) -> Tensor:
        return values.T @ values

    def prune(self, linear: nn.Linear, mask: Any, statistic: Tensor, sparsity: float) -> None:
        weight = entering(linear, mask)
        factor = cholesky_of_inverse(2 * statistic, self.damping)
        idle = statistic.diagonal() == 0  # an input that is always zero: its weights do nothing
        kept, pruned = compensated(
            weight.to(factor.dtype).masked_fill(idle, 0.0), factor, Pattern.parse(self.pattern), sparsity, self.columns
        )
        mask.take(kept)
        add_to_base(linear, torch.where(kept, pruned.to(weight.dtype) - weight, 0.0))


def compensated(
    weight: Tensor, factor: Tensor, pattern: Pattern, sparsity: float, columns: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mask and weight (out, in) of SparseGPT, from U of `cholesky_of_inverse`. The lowest of every `columns` columns
    go, as many in all as sparsity * n; a group of N:M lies in one stretch of columns."""
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    rows, width = weight.shape
    step = columns // pattern.group * pattern.group if pattern.group else columns
    for start in range(0, width, step):
        stop = min(start + step, width)
        part, inverse = weight[:, start:stop], factor[start:stop, start:stop]
        if not pattern.group:
            drop = round(sparsity * rows * stop) - round(sparsity * rows * start)
            kept[:, start:stop] = Pattern().draw(saliency(part, inverse), drop / part.numel())
        errors = drop_columns(part, inverse, kept[:, start:stop], pattern)
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return kept, weight


def saliency(weight: Tensor, factor: Tensor) -> Tensor:
    """w^2 / [H^-1]_jj, the error that the loss of each weight makes. (out, columns)."""
    return (weight / factor.diagonal()).square()


def drop_columns(weight: Tensor, factor: Tensor, kept: Tensor, pattern: Pattern) -> Tensor:
    """Drop what `kept` does not keep from one stretch of columns, in place, each column's error going to those at its
    right; with N:M `kept` is drawn on the way. Returns the errors (out, columns)."""
    errors = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        if pattern.group and column % pattern.group == 0:
            group = slice(column, column + pattern.group)
            kept[:, group] = pattern.draw(saliency(weight[:, group], factor[group, group]), pattern.sparsity)
        errors[:, column] = weight[:, column].masked_fill(kept[:, column], 0.0) / factor[column, column]
        weight[:, column:] -= errors[:, column, None] * factor[column, column:]
        weight[:, column].masked_fill_(~kept[:, column], 0.0)  # exactly
    return errors
