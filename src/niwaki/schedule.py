"""Learning-rate schedules: a warm-up from zero, then a shape."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch

from niwaki.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """`warmup`: the fraction of the fit in which the rate rises linearly to its full value."""

    warmup: float = 0.06

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"schedule.warmup={self.warmup}: needs a number in 0..1, below 1")

    @abc.abstractmethod
    def shape(self, progress: float) -> float:
        """Share of the full rate after the warm-up; `progress` runs from 0 to 1."""

    def build(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """A scheduler to be stepped once per optimizer step, over `steps` of them."""
        rise = round(self.warmup * steps)

        def share(step: int) -> float:
            if step < rise:
                return (step + 1) / (rise + 1)
            return self.shape(min((step - rise) / max(steps - rise, 1), 1.0))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """Falls linearly to zero."""

    def shape(self, progress: float) -> float:
        return 1 - progress


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Falls along half a cosine to zero (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    def shape(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Stays at the full rate."""

    def shape(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class SWA(Schedule):
    """Falls to a rate that stays, as stochastic weight averaging wants it (Izmailov et al. 2018, arXiv:1803.05407).

    Full until half of `begin`, then linearly down to `floor` at nine tenths of it, then constant; `begin` is that of
    `callbacks=swa`, where the average begins.
    """

    begin: float = 0.75
    floor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.begin <= 1:
            raise ConfigError(f"schedule.begin={self.begin}: needs a number above 0, up to 1")
        if not 0 < self.floor < 1:
            raise ConfigError(f"schedule.floor={self.floor}: needs a number above 0 and below 1")

    def shape(self, progress: float) -> float:
        fallen = min(max((progress / self.begin - 0.5) / 0.4, 0.0), 1.0)
        return 1 - (1 - self.floor) * fallen
