"""Weights as floats of 8 bits (Micikevicius et al. 2022, arXiv:2209.05433)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from niwaki.compression.quantize.floats import FloatStorage
from niwaki.errors import ConfigError

Format = Literal["e4m3", "e5m2"]
DTYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class Float8(FloatStorage):
    """w ~ float8(w / s) s, with s = max|w| / the largest finite float of an output channel: 448 for e4m3, 57344 for
    e5m2. `activations`: what enters the linears is rounded to e4m3 in the same way, token by token."""

    paper: ClassVar[str] = "Micikevicius et al. 2022, arXiv:2209.05433"

    format: Format = "e4m3"
    activations: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in get_args(Format):
            raise ConfigError(f"{self.field}.format={self.format!r}: needs one of {', '.join(get_args(Format))}")

    @property
    def dtype(self) -> str:
        return DTYPES[self.format]

    @property
    def rounds_inputs(self) -> bool:
        return self.activations
