"""Pruning by a score, once or along the fit: one-shot, cubic, in rounds with rewinding, or with regrowth (RigL)."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from niwaki.compression.prune.mask import MaskSchedule, cubic
from niwaki.compression.prune.pattern import Pattern, Scope, Selection
from niwaki.compression.prune.pruning import Pruning, Span, given
from niwaki.compression.prune.rewind import Rewinding
from niwaki.compression.prune.rigl import RigL, moves_at
from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects, Stage, Tuning
from niwaki.weights import entering

Masks = Mapping[str, tuple[nn.Linear, Any]]
OWN: dict[str, tuple[str, ...]] = {  # the settings that a schedule takes
    "one_shot": (),
    "cubic": ("begin", "end", "interval"),
    "rewind": ("begin", "end", "rounds"),
    "rigl": ("begin", "end", "interval", "fraction"),
}


@dataclass(frozen=True, kw_only=True)
class Scheduled(Pruning):
    """The weights of the lowest score go: of each row, of each linear (layer), or of all of them together (global).

    `schedule=one_shot`: before the fit. `cubic`: from 0 at `begin` to the whole sparsity at `end` (both fractions of
    the fit), the mask drawn anew every `interval` optimizer steps: s(t) = s (1 - (1 - t)^3). `rewind`: in `rounds` of
    equal length from `begin` to `end`, each of which drops the same share of what is left and puts all that learns back
    to its values at `begin`; the learning rate goes on, so schedule=constant comes closest to the paper. `rigl`: sparse
    from the start; every `interval` steps from `begin` to `end` a share of the connections moves from the smallest
    magnitudes to the largest gradients, `fraction` at first and less along a cosine; where the weights rest (below the
    blocks that learn, or beside adapters) nothing moves.
    """

    scope: Scope = "layer"
    schedule: Literal["one_shot", "cubic", "rewind", "rigl"] = "one_shot"
    begin: float | None = None
    end: float | None = None
    interval: int | None = None
    rounds: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_scope(self.scope, ("layer", "row", "global"))
        if self.schedule not in OWN:
            raise ConfigError(f"{self.field}.schedule={self.schedule!r}: needs one of {', '.join(OWN)}")
        for name in ("begin", "end", "interval", "rounds", "fraction"):
            if getattr(self, name) is not None and name not in OWN[self.schedule]:
                other = next(kind for kind, own in OWN.items() if name in own)
                raise ConfigError(
                    f"{self.field}.{name}: has no effect with schedule={self.schedule}; "
                    f"set {self.field}.schedule={other}"
                )
        if given(self.rounds, 1) < 1:
            raise ConfigError(f"{self.field}.rounds={self.rounds}: needs a whole number of at least 1")
        if not 0 < given(self.fraction, 0.3) <= 1:
            raise ConfigError(f"{self.field}.fraction={self.fraction}: needs a number above 0, up to 1")
        self.span.check(self.field)
        self._check_regrowth()

    def _check_regrowth(self) -> None:
        if self.schedule == "rigl" and Pattern.parse(self.pattern).group:
            raise ConfigError(
                f"{self.field}.schedule=rigl: connections that move would leave the pattern {self.pattern}; use "
                "unstructured, or a block such as 4x4"
            )
        if self.schedule == "rigl" and self.scope == "row":
            raise ConfigError(f"{self.field}.scope=row: connections that move with schedule=rigl leave their row")

    @property
    def span(self) -> Span:
        """Begin, end and interval of the schedule, with what is usual where they are not given."""
        begin = given(self.begin, 0.0)
        ends = {"rewind": 1 - (1 - begin) / (self.round_count + 1), "rigl": 0.75}  # rewind: all rounds as long
        return Span(begin=begin, end=given(self.end, ends.get(self.schedule, 0.5)), interval=given(self.interval, 10))

    @property
    def round_count(self) -> int:
        """The rounds of `rewind`."""
        return int(given(self.rounds, 3))

    @property
    def compared(self) -> Scope:
        return self.scope

    @property
    def moves_base(self) -> bool:
        return self.schedule == "rigl"

    def conflict(self, others: Sequence[Stage]) -> str | None:
        tuning = next((other for other in others if isinstance(other, Tuning)), None)
        if self.schedule == "rewind" and tuning and not tuning.may_be_averaged:
            return (
                f"tuning={tuning.name} and {self.name} with {self.field}.schedule=rewind: what the tuning dropped "
                "would come back with the values of an earlier step; use another schedule"
            )
        if self.schedule == "rigl" and tuning and not tuning.moves_linears:
            return (
                f"tuning={tuning.name} and {self.name} with {self.field}.schedule=rigl: none of the pruned weights "
                "learns, and those that come back begin at zero; use another schedule"
            )
        return super().conflict(others)

    @abc.abstractmethod
    def score(self, weight: Tensor, mask: Any) -> Tensor:
        """How much each weight counts, (out, in), from the weight that enters the mask; the lowest go."""

    def first_scores(self, model: nn.Module, masks: Masks, context: Context) -> dict[Any, Tensor]:
        """By mask, the scores before the fit."""
        return {mask: self.score(entering(linear, mask), mask) for linear, mask in masks.values()}

    def ready(self, masks: Masks, context: Context) -> None:
        """What the score needs before it is first asked for."""
        return None

    def needs_fit(self) -> str | None:
        if self.schedule == "one_shot":
            return None
        return f"{self.field}.schedule={self.schedule}: needs a fit; use one_shot with trainer.max_epochs=0"

    def check_steps(self, steps: int) -> None:
        first, last = self.span.steps(steps)
        if self.schedule == "rewind" and len({first, *self._round_ends(steps), steps}) < self.round_count + 2:
            raise ConfigError(
                f"{self.field}.rounds={self.round_count}: a fit of {steps} optimizer steps has no room for them and "
                "for training after the last; needs fewer rounds or a longer fit"
            )
        if self.schedule == "rigl" and not any(moves_at(s, first, last, self.span.interval) for s in range(1, last)):
            raise ConfigError(
                f"{self.field}.interval={self.span.interval}: no connection would move in a fit of {steps} "
                f"optimizer steps, from step {first} to before {last}; needs a smaller one"
            )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        masks = self.masks(context)
        self.ready(masks, context)
        selection = self.selection(masks, self.scope)
        if self.schedule in ("one_shot", "rigl"):
            selection.draw(self.first_scores(model, masks, context))
        plan = {"cubic": self._cubic, "rewind": self._rewinding, "rigl": self._regrowth}
        return plan[self.schedule](masks, selection, context) if self.schedule in plan else Effects()

    def _cubic(self, masks: Masks, selection: Selection, context: Context) -> Effects:
        span = self.span
        _, last = span.steps(context.steps)
        schedule = MaskSchedule(
            dict(masks.values()), score=self.score, selection=selection, last_step=last, interval=span.interval,
            progress=cubic(1.0, span.begin, span.end, context.steps),
        )  # fmt: skip
        schedule.draw(0)
        return Effects(callbacks=[schedule], settled=last)

    def _rewinding(self, masks: Masks, selection: Selection, context: Context) -> Effects:
        first, last = self.span.steps(context.steps)
        schedule = Rewinding(
            dict(masks.values()), score=self.score, selection=selection, origin=first,
            ends=self._round_ends(context.steps),
        )  # fmt: skip
        return Effects(callbacks=[schedule], settled=last)

    def _round_ends(self, steps: int) -> list[int]:
        """The optimizer steps at which the rounds of `rewind` end."""
        (first, last), count = self.span.steps(steps), self.round_count
        return [first + round((last - first) * index / count) for index in range(1, count + 1)]

    def _regrowth(self, masks: Masks, selection: Selection, context: Context) -> Effects:
        moving = {linear: mask for linear, mask in masks.values() if linear.weight.requires_grad}
        if not moving:
            raise ConfigError(
                f"{self.field}.schedule=rigl: none of the weights that targets names learns with this tuning, and those"
                " that come back begin at zero; use another schedule"
            )
        first, last = self.span.steps(context.steps)
        schedule = RigL(
            moving, pattern=selection.pattern, fraction=given(self.fraction, 0.3), first=first, last=last,
            interval=self.span.interval,
        )  # fmt: skip
        return Effects(callbacks=[schedule], settled=last)
