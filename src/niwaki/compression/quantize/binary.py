"""Binary weights (Rastegari et al. 2016, arXiv:1603.05279)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from niwaki.compression.quantize.signs import Signs
from niwaki.stage import Phase, Stage


@dataclass(frozen=True, kw_only=True)
class Binary(Signs):
    """sign(w) * mean|w|: 1 bit a weight, and no zero.

    The paper's gradient of a weight scales with its size and stops where |w| > 1; here it passes as it is.
    """

    paper: ClassVar[str] = "Rastegari et al. 2016, arXiv:1603.05279"
    bits: ClassVar[int] = 1

    def conflict(self, others: Sequence[Stage]) -> str | None:
        pruning = next((other.name for other in others if other.phase is Phase.PRUNE), None)
        if pruning:
            return f"{pruning} and {self.name}: a pruned weight would not stay zero; use quantize/ternary"
        return super().conflict(others)

    def signs(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        size = grouped.abs().mean(-1, keepdim=True)
        return torch.where(grouped < 0, -1.0, 1.0), size
