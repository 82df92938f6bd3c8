"""Bottleneck adapters, two in each block (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.model.anatomy import Anatomy
from niwaki.tuning.bottleneck import Reads
from niwaki.tuning.bottleneck_tuning import BottleneckTuning


@dataclass(frozen=True, kw_only=True)
class Houlsby(BottleneckTuning):
    """y -> y + U f(D y + b) + c, behind the output projections of attention and of feed-forward, before the residual
    sum and its norm; D (m, d) and U (d, m), so 2 m d + d + m parameters each, two in a block. The norms learn too.

    D starts normal with deviation 0.01. The paper draws U alike and finds any deviation up to 0.01 as good.
    """

    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv:1902.00751"
    down_std: ClassVar[float | None] = 0.01

    size: int | None = 64
    activation: str = "gelu"
    norms: bool = True
    init_std: float = 1e-4

    @property
    def parts(self) -> list[str]:
        return ["output", "feed_out"]

    def reads(self, anatomy: Anatomy) -> Reads:
        return "output"
