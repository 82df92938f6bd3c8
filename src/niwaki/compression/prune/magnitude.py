"""Magnitude pruning (Han et al. 2015, arXiv:1506.02626), one-shot or on the cubic schedule of Zhu & Gupta
(2017, arXiv:1710.01878); unstructured or N:M (Zhou et al. 2021, arXiv:2102.04010)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from niwaki.compression.prune.scheduled import Scheduled


def magnitude(weight: Tensor) -> Tensor:
    """|w|, for every element."""
    return weight.abs()


@dataclass(frozen=True, kw_only=True)
class Magnitude(Scheduled):
    """Keep the weights of largest magnitude: w * m, with m = 1 where |w| is among the (1 - sparsity) largest."""

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626; Zhu & Gupta 2017, arXiv:1710.01878"

    def score(self, weight: Tensor, mask: Any) -> Tensor:
        return magnitude(weight)
