"""Magnitude pruning (Han et al. 2015, arXiv:1506.02626), one-shot or on the cubic schedule of Zhu & Gupta
(2017, arXiv:1710.01878); unstructured or N:M (Zhou et al. 2021, arXiv:2102.04010)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from niwaki.compression.prune.mask import Mask, MaskSchedule, Pattern, cubic, mask_targets
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage


def magnitude(weight: Tensor) -> Tensor:
    """|w|, for every element."""
    return weight.abs()


@dataclass(frozen=True, kw_only=True)
class Magnitude(Stage):
    """Keep the weights of largest magnitude: w * m, with m = 1 where |w| is among the (1 - sparsity) largest.

    `sparsity`: fraction of each target (scope=layer) or of all targets together (scope=global) that becomes zero;
    with pattern N:M (N of every M neighbours along the input are kept) it follows from the pattern.
    `schedule=cubic`: from 0 at `begin` to the whole sparsity at `end` (both fractions of the fit), the mask drawn
    anew every `interval` optimizer steps: s(t) = s (1 - (1 - t)^3).
    """

    phase: ClassVar[Phase] = Phase.PRUNE
    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626; Zhu & Gupta 2017, arXiv:1710.01878"

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: Literal["layer", "global"] = "layer"
    schedule: Literal["one_shot", "cubic"] = "one_shot"
    begin: float = 0.0
    end: float = 0.5
    interval: int = 10

    def __post_init__(self) -> None:
        field = "compression.magnitude"
        pattern = Pattern.parse(self.pattern, f"{field}.pattern")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ConfigError(f"{field}.sparsity={self.sparsity}: needs a number above 0 and below 1")
        if pattern.group and self.sparsity not in (None, pattern.sparsity):
            raise ConfigError(
                f"{field}.sparsity={self.sparsity}: the pattern {self.pattern} makes it {pattern.sparsity}; leave it out"
            )
        if self.scope not in ("layer", "global"):
            raise ConfigError(f"{field}.scope={self.scope!r}: needs layer or global")
        if pattern.group and self.scope == "global":
            raise ConfigError(f"{field}.scope=global: has no effect with the pattern {self.pattern}; use scope=layer")
        if self.schedule not in ("one_shot", "cubic"):
            raise ConfigError(f"{field}.schedule={self.schedule!r}: needs one_shot or cubic")
        if not 0 <= self.begin < self.end <= 1:
            raise ConfigError(f"{field}.begin={self.begin}, end={self.end}: needs 0 <= begin < end <= 1")
        if self.interval < 1:
            raise ConfigError(f"{field}.interval={self.interval}: needs a whole number of at least 1")

    @property
    def final_sparsity(self) -> float:
        """The fraction of zeros that is aimed at."""
        return Pattern.parse(self.pattern).sparsity or self.sparsity or 0.5

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        group = Pattern.parse(self.pattern).group
        for name, linear in targets.items():
            if group and linear.in_features % group:
                raise ConfigError(
                    f"compression.magnitude.pattern={self.pattern}: {name} has {linear.in_features} inputs, "
                    f"which {group} does not divide"
                )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        masks = mask_targets(context.targets, Mask)
        schedule = MaskSchedule(
            masks,
            score=magnitude,
            pattern=Pattern.parse(self.pattern),
            together=self.scope == "global",
            sparsity_at=cubic(self.final_sparsity, self.begin, self.end, context.steps)
            if self.schedule == "cubic"
            else lambda step: self.final_sparsity,
            last_step=max(round(self.end * context.steps), 1) if self.schedule == "cubic" else 0,
            interval=self.interval,
        )
        schedule.draw(0)
        return Effects(callbacks=[schedule], settled=schedule.last_step)
