"""Scaled parallel adapters (He et al. 2022, arXiv:2110.04366)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.tuning.bottleneck import Reads
from niwaki.tuning.bottleneck_tuning import BottleneckTuning

PARTS = {"feed_forward": "feed_out", "attention": "output"}


@dataclass(frozen=True, kw_only=True)
class Parallel(BottleneckTuning):
    """F(x) -> F(x) + s (U f(D x + b) + c), with F the feed-forward (or the attention) and x what it reads; s = `scale`.

    D starts as in LoRA (Kaiming-uniform) and U at zero, so the model starts exactly as the base.
    `beside`: feed_forward, where the paper finds it best, or attention.
    """

    paper: ClassVar[str] = "He et al. 2022, arXiv:2110.04366"
    down_std: ClassVar[float | None] = None

    size: int | None = 64
    activation: str = "relu"
    init_std: float = 0.0
    scale: float = 4.0
    beside: Literal["feed_forward", "attention"] = "feed_forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ConfigError(f"tuning.scale={self.scale}: needs a number above 0")
        if self.beside not in PARTS:
            raise ConfigError(f"tuning.beside={self.beside!r}: needs one of {', '.join(PARTS)}")

    @property
    def parts(self) -> list[str]:
        return [PARTS[self.beside]]

    @property
    def factor(self) -> float:
        return self.scale

    def reads(self, anatomy: Anatomy) -> Reads:
        return "input"
