"""Weights as bfloat16: floats of 16 bits with the range of fp32 (Kalamkar et al. 2019, arXiv:1905.12322)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.compression.quantize.floats import FloatStorage


@dataclass(frozen=True, kw_only=True)
class BFloat16(FloatStorage):
    """w -> bfloat16(w), rounded to the nearest, ties to even. The product is one in the type of the input."""

    paper: ClassVar[str] = "Kalamkar et al. 2019, arXiv:1905.12322"

    @property
    def dtype(self) -> str:
        return "bfloat16"
