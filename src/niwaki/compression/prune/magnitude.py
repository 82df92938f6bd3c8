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
    begin: float | None = None
    end: float | None = None
    interval: int | None = None

    def __post_init__(self) -> None:
        field = "compression.magnitude"
        pattern = Pattern.parse(self.pattern, f"{field}.pattern")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ConfigError(f"{field}.sparsity={self.sparsity}: needs a number above 0 and below 1")
        if pattern.group and self.sparsity not in (None, pattern.sparsity):
            raise ConfigError(
                f"{field}.sparsity={self.sparsity}: pattern {self.pattern} makes it {pattern.sparsity}; leave it out"
            )
        if self.scope not in ("layer", "global"):
            raise ConfigError(f"{field}.scope={self.scope!r}: needs layer or global")
        if pattern.group and self.scope == "global":
            raise ConfigError(f"{field}.scope=global: has no effect with the pattern {self.pattern}; use scope=layer")
        if self.schedule not in ("one_shot", "cubic"):
            raise ConfigError(f"{field}.schedule={self.schedule!r}: needs one_shot or cubic")
        given = [n for n in ("begin", "end", "interval") if getattr(self, n) is not None]
        if given and self.schedule == "one_shot":
            raise ConfigError(f"{field}.{given[0]}: has no effect with schedule=one_shot; set {field}.schedule=cubic")
        begin, end, interval = self.span
        if not 0 <= begin < end <= 1:
            raise ConfigError(f"{field}.begin={begin}, end={end}: needs 0 <= begin < end <= 1")
        if interval < 1:
            raise ConfigError(f"{field}.interval={interval}: needs a whole number of at least 1")

    @property
    def span(self) -> tuple[float, float, int]:
        """Begin, end and interval of the cubic schedule: 0, 0.5 and 10 where they are not given."""
        return (
            0.0 if self.begin is None else self.begin,
            0.5 if self.end is None else self.end,
            10 if self.interval is None else self.interval,
        )

    @property
    def final_sparsity(self) -> float:
        """The fraction of zeros that is aimed at."""
        return Pattern.parse(self.pattern).sparsity or self.sparsity or 0.5

    def needs_fit(self) -> str | None:
        if self.schedule == "one_shot":
            return None
        return "compression.magnitude.schedule=cubic: needs a fit; use one_shot with trainer.max_epochs=0"

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        group = Pattern.parse(self.pattern).group
        for name, linear in targets.items():
            if group and linear.in_features % group:
                raise ConfigError(
                    f"compression.magnitude.pattern={self.pattern}: {name} has {linear.in_features} inputs, "
                    f"which {group} does not divide"
                )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        begin, end, interval = self.span
        gradual = self.schedule == "cubic"
        schedule = MaskSchedule(
            mask_targets(context.targets, Mask),
            score=magnitude,
            pattern=Pattern.parse(self.pattern),
            together=self.scope == "global",
            sparsity_at=cubic(self.final_sparsity, begin, end, context.steps) if gradual else self._at_once,
            last_step=max(round(end * context.steps), 1) if gradual else 0,
            interval=interval,
        )
        schedule.draw(0)
        return Effects(callbacks=[schedule], settled=schedule.last_step)

    def _at_once(self, step: int) -> float:
        return self.final_sparsity
