"""Where zeros may stand, and which weights stay: the lowest scores go, within a pattern and a scope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from niwaki.errors import ConfigError

if TYPE_CHECKING:
    from niwaki.compression.prune.mask import Mask

Scope = Literal["layer", "row", "global"]


@dataclass(frozen=True)
class Pattern:
    """Anywhere (group 0), all but `keep` of every `group` neighbours along the input (N:M), or whole blocks of
    `height` outputs x `width` inputs."""

    keep: int = 0
    group: int = 0
    height: int = 1
    width: int = 1

    @classmethod
    def parse(cls, text: str, field: str = "pattern") -> Pattern:
        """`unstructured`, `N:M`, or `RxC`.

        Raises:
            ConfigError: none of them, not 0 < N < M, or a block of fewer than two weights.
        """
        if text == "unstructured":
            return cls()
        keep, colon, group = str(text).partition(":")
        if colon and keep.isdigit() and group.isdigit() and 0 < int(keep) < int(group):
            return cls(int(keep), int(group))
        height, times, width = str(text).partition("x")
        if times and height.isdigit() and width.isdigit() and int(height) * int(width) > 1:
            return cls(height=int(height), width=int(width))
        raise ConfigError(
            f"{field}={text!r}: needs unstructured, or N:M with N below M, such as '2:4', or a block of outputs x "
            "inputs, such as 4x4"
        )

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that an N:M pattern makes; 0 without one."""
        return 1 - self.keep / self.group if self.group else 0.0

    @property
    def block(self) -> bool:
        """Whether weights stay or go in blocks."""
        return self.height * self.width > 1

    def misfit(self, outputs: int, inputs: int) -> str | None:
        """What of a weight (outputs, inputs) this pattern does not divide, or None."""
        if inputs % (self.group or self.width):
            return f"{inputs} inputs, which {self.group or self.width} does not divide"
        return f"{outputs} outputs, which {self.height} does not divide" if outputs % self.height else None

    def dropped(self, sparsity: float, outputs: int, inputs: int, *, by_row: bool) -> tuple[int, int]:
        """(how many go, of how many) of a weight (outputs, inputs), or of each of its rows: blocks where there are any,
        of each group with N:M."""
        if self.group:
            return self.group - self.keep, self.group
        count = inputs // self.width * (1 if by_row else outputs // self.height)
        return round(sparsity * count), count

    def pool(self, scores: Tensor) -> Tensor:
        """One score for each block, the mean of its weights': (out / height, in / width)."""
        if not self.block:
            return scores
        rows, columns = scores.shape[0] // self.height, scores.shape[1] // self.width
        return scores.reshape(rows, self.height, columns, self.width).mean((1, 3))

    def spread(self, pooled: Tensor) -> Tensor:
        """The inverse for masks: (out / height, in / width) -> (out, in)."""
        return pooled.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1) if self.block else pooled

    def draw(self, scores: Tensor, sparsity: float, *, by_row: bool = False) -> Tensor:
        """The mask (same shape, booleans) that drops the lowest scores.

        Unstructured: exactly round(sparsity * n) of the n scores, or of each row. Blocks: the same of the blocks. N:M:
        the lowest ceil-free share of every group, floor(sparsity * M) of M, so that the pattern is whole when the
        sparsity has reached 1 - N/M.
        """
        if self.group:
            drop = int(sparsity * self.group + 1e-6)
            return keep_largest(scores.reshape(-1, self.group), drop).view(scores.shape)
        pooled = self.pool(scores)
        rows = pooled if by_row else pooled.flatten()[None]
        return self.spread(keep_largest(rows, round(sparsity * rows.shape[1])).view(pooled.shape))


def keep_largest(scores: Tensor, drop: int) -> Tensor:
    """Per row of `scores` (rows, n): False at exactly the `drop` lowest, the first ones among equals. (rows, n)."""
    if not drop:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(drop, dim=1, keepdim=True).values  # several times faster than topk of half a matrix
    low = scores <= threshold
    surplus = low.sum(1, keepdim=True) - drop
    if surplus.any():  # equals of the threshold: only as many of them go as are needed
        equal = scores == threshold
        low &= ~(equal & (equal.cumsum(1) > equal.sum(1, keepdim=True) - surplus))
    return ~low


@dataclass(frozen=True)
class Selection:
    """Which weights of several masks stay: `sparsity` is the final one of each, reached at progress 1."""

    pattern: Pattern
    scope: Scope
    sparsity: Mapping[Mask, float]

    def draw(self, scores: Mapping[Mask, Tensor], progress: float = 1.0) -> None:
        """Set every mask from its scores (out, in)."""
        wanted = {mask: self.sparsity[mask] * progress for mask in scores}
        if self.scope == "global":
            drawn = self._together(scores, next(iter(wanted.values())))
        else:
            by_row = self.scope == "row"
            drawn = {mask: self.pattern.draw(s, wanted[mask], by_row=by_row) for mask, s in scores.items()}
        for mask, kept in drawn.items():
            mask.take(kept)

    def _together(self, scores: Mapping[Mask, Tensor], sparsity: float) -> dict[Mask, Tensor]:
        pooled = {mask: self.pattern.pool(s) for mask, s in scores.items()}
        flat = torch.cat([p.flatten() for p in pooled.values()])
        parts = keep_largest(flat[None], round(sparsity * len(flat)))[0].split([p.numel() for p in pooled.values()])
        return {m: self.pattern.spread(part.view(p.shape)) for (m, p), part in zip(pooled.items(), parts, strict=True)}
