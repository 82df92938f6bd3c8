"""Ternary weights (Li et al. 2016, arXiv:1605.04711), as TernaryBERT trains them with distillation (Zhang et al. 2020,
arXiv:2009.12812)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from niwaki.compression.quantize.signs import Signs


@dataclass(frozen=True, kw_only=True)
class Ternary(Signs):
    """sign(w) * a where |w| > d, else 0, with d = 0.7 mean|w| and a the mean of |w| above it: 2 bits a weight.

    TernaryBERT draws one size for a whole linear; here each output channel, or each group, has its own. It rounds
    activations to 8 bits between the least and the greatest of all, and the embeddings too; here each token has a
    range around 0, and embeddings stay.
    """

    paper: ClassVar[str] = "Li et al. 2016, arXiv:1605.04711; Zhang et al. 2020, arXiv:2009.12812"
    bits: ClassVar[int] = 2

    def signs(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        sizes = grouped.abs()
        kept = sizes > 0.7 * sizes.mean(-1, keepdim=True)
        count = kept.sum(-1, keepdim=True)
        size = (sizes * kept).sum(-1, keepdim=True) / count.clamp(min=1)
        return grouped.sign() * kept, size.masked_fill(count == 0, 1.0)
