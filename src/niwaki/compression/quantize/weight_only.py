"""Rounding of the weights alone, to the nearest code (Jacob et al. 2018, arXiv:1712.05877)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from niwaki.compression.quantize.integers import FixedGrid
from niwaki.compression.quantize.post_training import Grouped, nearest


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Grouped):
    """codes = round(w / s + z), with s and z such that the codes just hold the values of a group."""

    paper: ClassVar[str] = "Jacob et al. 2018, arXiv:1712.05877"

    def fixed(self, weight: Tensor) -> FixedGrid:
        return nearest(weight, self.layout)
