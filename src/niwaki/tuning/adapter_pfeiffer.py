"""Bottleneck adapters, one in each block (Pfeiffer et al. 2020, arXiv:2005.00247; MAD-X, arXiv:2005.00052)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.model.anatomy import Anatomy
from niwaki.tuning.bottleneck import Reads
from niwaki.tuning.bottleneck_tuning import BottleneckTuning


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(BottleneckTuning):
    """r -> r + U f(D h + b) + c, with r the output of the feed-forward and h that of the norm after it: h = norm(r + z)
    with z its residual; then, as ever, the sum with z and the same norm. Where the norms stand before the sublayers
    none follows, and h = r. One in a block: 2 m d + d + m parameters.
    """

    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv:2005.00247, arXiv:2005.00052"
    down_std: ClassVar[float | None] = 0.01

    size: int | None = 48
    activation: str = "relu"
    init_std: float = 1e-4

    @property
    def parts(self) -> list[str]:
        return ["feed_out"]

    def reads(self, anatomy: Anatomy) -> Reads:
        return "normed" if anatomy.family.post_norm else "output"
