"""What pruning of heads and of neurons has in common: how many go, which, when, and that they are really gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from niwaki.compression.prune.gates import GateSchedule, add_gates, take_gates
from niwaki.compression.prune.importance import Importance, measure
from niwaki.compression.prune.mask import cubic, keep_largest
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.cut_units import CutUnits, cut_all, tell_config
from niwaki.model.units import Kind, Units, units_of
from niwaki.stage import Context, Effects, Phase, Stage, Tuning
from niwaki.weights import cut_record

ROWS = 256  # of calibration, where the setting is null
Keep = int | Sequence[int | Sequence[int]] | None


@dataclass(frozen=True, kw_only=True)
class Structured(Stage):
    """Take the least important units out of every sublayer, and with them their rows and columns of the linears.

    `ratio`: the fraction that goes, round(ratio * n) of the n units of each sublayer (scope=layer), or of all together
    (scope=global; the best unit of each sublayer stays). `keep`: how many stay instead, in every sublayer, or a list
    with a number for each, in the order in which data flows; in place of a number, a list of the units themselves.
    `schedule=cubic`: gates before the output linears close during the fit, s(t) = s (1 - (1 - t)^3) of what goes, by
    the importance since they were last set, and what is closed at the end is cut after the fit.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    turn: ClassVar[int] = 1
    leaves_out_units: ClassVar[bool] = True
    kind: ClassVar[Kind]

    ratio: float | None = None
    keep: Keep = None
    importance: Importance = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    calibration: int | None = None
    schedule: Literal["one_shot", "cubic"] = "one_shot"
    begin: float | None = None
    end: float | None = None
    interval: int | None = None

    def __post_init__(self) -> None:
        self._check_how_many()
        self._check_importance()
        self._check_schedule()

    def _check_how_many(self) -> None:
        field = self.field
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(f"{field}.ratio={self.ratio}: needs a number above 0 and below 1")
        if self.ratio is not None and self.keep is not None:
            raise ConfigError(f"{field}.ratio={self.ratio}: has no effect beside {field}.keep; leave one out")
        if self.keep is not None and not well_formed(self.keep):
            raise ConfigError(
                f"{field}.keep={shown(self.keep)}: needs a whole number of at least 1, or a list of them, or "
                f"with the {self.kind} that stay, of each sublayer"
            )
        if self.scope not in ("layer", "global"):
            raise ConfigError(f"{field}.scope={self.scope!r}: needs layer or global")
        if self.keep is not None and self.scope == "global":
            raise ConfigError(f"{field}.scope=global: has no effect beside {field}.keep; use scope=layer")

    def _check_importance(self) -> None:
        field = self.field
        if self.importance not in ("magnitude", "taylor", "activation"):
            raise ConfigError(f"{field}.importance={self.importance!r}: needs magnitude, taylor or activation")
        if self.calibration is None:
            return
        if self.calibration < 1:
            raise ConfigError(f"{field}.calibration={self.calibration}: needs null or a whole number of at least 1")
        if self.importance == "magnitude" or self.schedule == "cubic":
            why = "importance=magnitude" if self.importance == "magnitude" else "schedule=cubic"
            raise ConfigError(f"{field}.calibration={self.calibration}: has no effect with {why}; leave null")

    def _check_schedule(self) -> None:
        field = self.field
        if self.schedule not in ("one_shot", "cubic"):
            raise ConfigError(f"{field}.schedule={self.schedule!r}: needs one_shot or cubic")
        given = [name for name in ("begin", "end", "interval") if getattr(self, name) is not None]
        if given and self.schedule == "one_shot":
            raise ConfigError(f"{field}.{given[0]}: has no effect with schedule=one_shot; set {field}.schedule=cubic")
        begin, end, interval = self.span
        if not 0 <= begin < end <= 1:
            raise ConfigError(f"{field}.begin={begin}, end={end}: needs 0 <= begin < end <= 1")
        if interval < 1:
            raise ConfigError(f"{field}.interval={interval}: needs a whole number of at least 1")

    @property
    def field(self) -> str:
        """Where the settings stand in the config."""
        return f"compression.{self.kind}"

    @property
    def span(self) -> tuple[float, float, int]:
        """Begin, end and interval of the cubic schedule: 0, 0.5 and 10 where they are not given."""
        return (
            0.0 if self.begin is None else self.begin,
            0.5 if self.end is None else self.end,
            10 if self.interval is None else self.interval,
        )

    def foreign(self) -> str | None:
        kept = self.keep if isinstance(self.keep, Sequence) else ()
        widths = {one if isinstance(one, int) else len(one) for one in kept}
        uneven = self.scope == "global" or (len(widths) > 1 and self.schedule == "cubic")
        return "sublayers of different widths" if uneven else None

    def conflict(self, others: Sequence[Stage]) -> str | None:
        gradual = self.schedule == "cubic"
        for other in others:
            pattern = getattr(other, "pattern", "unstructured")
            grouped = getattr(other, "group", None) or pattern != "unstructured"
            if grouped and other.acts_on_linears and (gradual or self.scope == "global"):
                when = "schedule=cubic" if gradual else "scope=global"
                return (
                    f"{self.name} with {when} and {other.name} with groups along the input: how many inputs a linear "
                    "will have is not known before, and groups may not divide them; use one_shot with scope=layer"
                )
            if getattr(other, "block", None) and self.scope == "global" and not gradual:
                return (
                    f"{self.name} with scope=global and tuning={other.name}: how many inputs a linear will have is not "
                    "known before, and blocks may not divide them; use scope=layer"
                )
            if gradual and other.phase is Phase.SHARE:
                return (
                    f"{self.name} with schedule=cubic and {other.name}: values are shared by the weights of whole "
                    "linears, and units would leave them after that; use schedule=one_shot"
                )
            if gradual and getattr(other, "merge", None) is False:
                return (
                    f"{self.name} with schedule=cubic and tuning={other.name} with tuning.merge=false: the adapters "
                    "beside the base would keep the shapes that are cut after the fit; use schedule=one_shot"
                )
            if gradual and self.importance == "magnitude" and isinstance(other, Tuning) and not other.trains_base:
                return (
                    f"{self.name} with schedule=cubic, importance=magnitude and tuning={other.name}: the weights that "
                    "it ranks by are frozen; use importance=taylor or activation, or schedule=one_shot"
                )
        return None

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        try:
            found = units_of(anatomy, self.kind)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"compression: {self.name}: {error}, so they cannot be cut") from error
        if not found:
            raise ConfigError(f"compression: {self.name}: this family of models has no {self.kind}")
        self._named(found)
        drops = self._drops(found)
        if self.scope == "layer" and not any(drops):
            few = max(units.count for units in found)
            asked = f"ratio={self._ratio}" if self.keep is None else f"keep={shown(self.keep)}"
            raise ConfigError(f"{self.field}.{asked}: has no effect on {few} {self.kind} in a sublayer")

    def outline(self, model: nn.Module) -> None:
        anatomy = Anatomy.of(model)
        if self.schedule == "one_shot" and self.scope == "layer":
            found = units_of(anatomy, self.kind)
            left = [units.count - drop for units, drop in zip(found, self._drops(found), strict=True)]
            cut_all(anatomy, {units: range(count) for units, count in zip(found, left, strict=True)})
            tell_config(anatomy, self.kind)

    def needs_fit(self) -> str | None:
        if self.schedule == "one_shot":
            return None
        return f"{self.field}.schedule=cubic: needs a fit; use one_shot with trainer.max_epochs=0"

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        found = units_of(context.anatomy, self.kind)
        choice = Choice(self._drops(found), self._named(found), self.scope == "global", self.importance == "taylor")
        if self.schedule == "cubic":
            return self._close_during_the_fit(model, context, found, choice)
        scores = measure(model, found, self.importance, self.calibration or ROWS, context)
        kept = [mask.nonzero().flatten().tolist() for mask in choice.draw(scores, 1.0)]
        return Effects(edits=[self._cut(context, found, kept)])

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        if self.schedule == "one_shot":
            return []
        found = units_of(context.anatomy, self.kind)
        kept = take_gates(model, found)
        cut_records(context, found, kept)
        return [self._cut(context, found, kept)]

    def _cut(self, context: Context, found: Sequence[Units], kept: Sequence[Sequence[int]]) -> Edit:
        cut_all(context.anatomy, dict(zip(found, kept, strict=True)))
        stayed = told(found, kept)
        context.facts[f"kept_{self.kind}"] = stayed
        return CutUnits(kind=self.kind, kept=stayed, in_config=tell_config(context.anatomy, self.kind))

    def _close_during_the_fit(self, model: nn.Module, context: Context, found: list[Units], choice: Choice) -> Effects:
        begin, end, interval = self.span
        schedule = GateSchedule(
            model, add_gates(model, found), kind=self.importance, draw=choice.draw, interval=interval,
            fraction_at=cubic(1.0, begin, end, context.steps), last_step=max(round(end * context.steps), 1),
        )  # fmt: skip
        return Effects(callbacks=[schedule], settled=schedule.last_step)

    @property
    def _ratio(self) -> float:
        return 0.5 if self.ratio is None else self.ratio

    def _drops(self, found: Sequence[Units]) -> list[int]:
        """How many units go: of each sublayer, or, with scope=global, of all (one number)."""
        if self.scope == "global":
            return [self._drop_of_all(found)]
        if self.keep is None:
            left = [units.count - round(self._ratio * units.count) for units in found]
        else:
            entries = [self.keep] * len(found) if isinstance(self.keep, int) else list(self.keep)
            self._check_length(entries, found)
            left = [entry if isinstance(entry, int) else len(entry) for entry in entries]
        for units, count in zip(found, left, strict=True):
            if count < 1:
                raise ConfigError(
                    f"{self.field}.ratio={self._ratio}: leaves none of the {units.count} {self.kind} of {units.place}; "
                    f"needs one that keeps at least 1"
                )
            if count > units.count:
                raise ConfigError(
                    f"{self.field}.keep={shown(self.keep)}: {units.place} has {units.count} {self.kind}; needs at most "
                    "as many"
                )
        return [units.count - count for units, count in zip(found, left, strict=True)]

    def _drop_of_all(self, found: Sequence[Units]) -> int:
        total = sum(units.count for units in found)
        drop = round(self._ratio * total)
        if total - drop < len(found):
            raise ConfigError(
                f"{self.field}.ratio={self._ratio}: leaves {total - drop} of {total} {self.kind} for {len(found)} "
                "sublayers; needs one that keeps at least 1 in each"
            )
        if not drop:
            raise ConfigError(f"{self.field}.ratio={self._ratio}: has no effect on {total} {self.kind}")
        return drop

    def _check_length(self, entries: Sequence[Any], found: Sequence[Units]) -> None:
        if len(entries) != len(found):
            raise ConfigError(
                f"{self.field}.keep={shown(self.keep)}: has {len(entries)} entries; the model has {len(found)} "
                f"sublayers with {self.kind}"
            )

    def _named(self, found: Sequence[Units]) -> list[list[int]]:
        """The units that the config names to stay, of each sublayer."""
        entries = self.keep if isinstance(self.keep, Sequence) else [0] * len(found)
        self._check_length(entries, found)
        named = [[] if isinstance(entry, int) else list(entry) for entry in entries]
        for units, its in zip(found, named, strict=True):
            if wrong := [unit for unit in its if unit >= units.count]:
                raise ConfigError(
                    f"{self.field}.keep={shown(self.keep)}: {units.place} has no number {wrong[0]}; needs numbers in "
                    f"0..{units.count - 1}"
                )
        return named


@dataclass(frozen=True)
class Choice:
    """Which units stay, by their importance.

    `drops`: how many go in the end, of each sublayer, or of all (one number) where they are ranked `together`; the
    best unit of each then stays. Taylor terms are divided by their l2 norm in each sublayer before they are compared
    with those of another (Michel et al. 2019, section 4.1; Molchanov et al. 2017).
    """

    drops: Sequence[int]
    named: Sequence[Sequence[int]]  # units that stay whatever their importance
    together: bool
    normalize: bool = False

    def draw(self, scores: Sequence[Tensor], fraction: float) -> list[Tensor]:
        """For each sublayer, True where a unit stays, when `fraction` of those that go in the end are gone."""
        if not self.together:
            drawn = zip(scores, self.drops, self.named, strict=True)
            return [lowest_dropped(safe(score, its), round(fraction * drop)) for score, drop, its in drawn]
        compared = [score / score.norm().clamp(min=1e-30) if self.normalize else score for score in scores]
        best = [safe(score, [int(score.argmax())]) for score in compared]
        mask = lowest_dropped(torch.cat(best), round(fraction * self.drops[0]))
        return list(mask.split([len(score) for score in scores]))


def safe(scores: Tensor, named: Sequence[int]) -> Tensor:
    """A copy in which these units are above all others."""
    raised = scores.double().clone()
    raised[list(named)] = torch.inf
    return raised


def lowest_dropped(scores: Tensor, drop: int) -> Tensor:
    """False at the `drop` lowest of (units,) scores."""
    return keep_largest(scores[None], drop)[0]


def told(found: Sequence[Units], kept: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What stayed, by place: the heads themselves, or the number of neurons."""
    return {u.place: list(its) if u.kind == "heads" else len(its) for u, its in zip(found, kept, strict=True)}


def cut_records(context: Context, found: Sequence[Units], kept: Sequence[Sequence[int]]) -> None:
    """Cut what the links left behind at the fold as the linears will be."""
    for units, its in zip(found, kept, strict=True):
        for name in units.rows:
            context.records[name] = cut_record(context.records.get(name, {}), rows=units.row_indices(name, its))
        output = context.records.get(units.output, {})
        context.records[units.output] = cut_record(output, columns=units.column_indices(its))


def well_formed(keep: Keep) -> bool:
    """Whether these can be numbers of units, or units."""
    entries = [keep] if isinstance(keep, int) else list(keep or [])
    numbers = all(entry >= 1 for entry in entries if isinstance(entry, int))
    lists = [list(entry) for entry in entries if not isinstance(entry, int)]
    return bool(entries) and numbers and all(its and len(set(its)) == len(its) and min(its) >= 0 for its in lists)


def shown(keep: Keep) -> str:
    """`keep` as it stands in a config."""
    return str(keep) if isinstance(keep, int) else str([e if isinstance(e, int) else list(e) for e in keep or []])
