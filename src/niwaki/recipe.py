"""A run, as configured: one object of each axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pytorch_lightning as pl

from niwaki.callbacks import CallbackSettings
from niwaki.data.source import Source
from niwaki.errors import ConfigError
from niwaki.export.export import Export
from niwaki.logger import LoggerSettings
from niwaki.measure.speed import Measure
from niwaki.model.load import Pretrained
from niwaki.model.teacher import Taught
from niwaki.naming import option_name
from niwaki.optimizer import OptimizerSettings
from niwaki.schedule import Schedule
from niwaki.stage import Phase, Stage, Tuning, ordered
from niwaki.task.task import Task
from niwaki.trainer import TrainerSettings

AXES: dict[str, type] = {
    "task": Task,
    "data": Source,
    "model": Pretrained,
    "tuning": Tuning,
    "optimizer": OptimizerSettings,
    "schedule": Schedule,
    "trainer": TrainerSettings,
    "logger": LoggerSettings,
    "measure": Measure,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run needs to know."""

    task: Task
    data: Source
    model: Pretrained
    tuning: Tuning
    optimizer: OptimizerSettings
    schedule: Schedule
    trainer: TrainerSettings
    logger: LoggerSettings
    measure: Measure
    compression: Mapping[str, Stage] = field(default_factory=dict)
    callbacks: Mapping[str, CallbackSettings | pl.Callback] = field(default_factory=dict)
    export: Mapping[str, Export] = field(default_factory=dict)
    seed: int = 0
    task_weight: float = 1.0
    store: Literal["auto", "dense"] = "auto"
    name: str = "run"
    study: str | None = None
    resume: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        for axis, kind in AXES.items():
            if not isinstance(getattr(self, axis), kind):
                raise ConfigError(f"{axis}: needs an option of configs/{axis}, not {getattr(self, axis)!r}")
        for key, stage in self.compression.items():
            if not isinstance(stage, Stage) or stage.phase is Phase.TUNE:
                raise ConfigError(f"compression.{key}: needs an option of configs/compression, not {stage!r}")
        for key, one in self.export.items():
            if not isinstance(one, Export):
                raise ConfigError(f"export.{key}: needs an option of configs/export, not {one!r}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed}: needs a whole number from 0 to 4294967295")
        if self.store not in ("auto", "dense"):
            raise ConfigError(f"store={self.store!r}: needs auto or dense")
        if self.task_weight < 0:
            raise ConfigError(f"task_weight={self.task_weight}: needs a number of at least 0")
        self.refuse_conflicts()
        self.refuse_unlabelled()
        if self.task_weight == 0 and not any(s.phase is Phase.OBJECTIVE and s.adds_term for s in self.stages):
            raise ConfigError("task_weight=0: nothing is left to learn from; add compression=[distill/logits]")

    @property
    def callback_settings(self) -> list[CallbackSettings]:
        """The configured callbacks of this project, without Lightning's own."""
        return [found for found in self.callbacks.values() if isinstance(found, CallbackSettings)]

    @property
    def fits(self) -> bool:
        """Whether there is something to learn from, and for at least one epoch."""
        return bool(self.trainer.max_epochs) and (self.data.shots != 0 or bool(self.data.unlabelled))

    def refuse_conflicts(self) -> None:
        """Raise ConfigError where the optimizer, an export or an average of the weights cannot go with the rest."""
        for reason in (self.task.conflict(self), self.optimizer.conflict(self)):
            if reason:
                raise ConfigError(reason)
        cutting = next((stage for stage in self.compression.values() if stage.leaves_out_blocks), None)
        if cutting and self.model.layers is not None:
            raise ConfigError(
                f"model.layers={list(self.model.layers)} and {cutting.name}: both say which blocks stay; leave one out"
            )
        averaging = [f"callbacks={key}" for key, found in self.callbacks.items() if getattr(found, "averages", False)]
        if len(averaging) > 1:
            raise ConfigError(
                f"{averaging[0]} and {averaging[1]}: each keeps its own average of the weights; choose one"
            )
        averaged = [*averaging, *(["optimizer=schedule_free"] if self.optimizer.average() else [])]
        if averaged and not self.tuning.may_be_averaged:
            raise ConfigError(
                f"{averaged[0]} and tuning={self.tuning.name}: what the tuning dropped would come back in the average; "
                "leave one out"
            )
        unlike = [reason for stage in self.stages if (reason := stage.averaging())]
        if averaged and unlike:
            raise ConfigError(f"{averaged[0]} and {unlike[0]}; leave one out")
        for one in self.export.values():
            if reason := one.conflict(self.stages):
                raise ConfigError(reason)
        reasons = [reason for stage in self.stages if (reason := stage.needs_fit())]
        if reasons and not self.fits:
            raise ConfigError(reasons[0])
        if averaging and not self.fits:
            none = "data.shots=0" if self.trainer.max_epochs else "trainer.max_epochs=0"
            raise ConfigError(f"{averaging[0]} and {none}: there is no fit to average over; leave one out")

    def refuse_unlabelled(self) -> None:
        """Raise ConfigError where rows without an answer would have no effect."""
        if self.data.unlabelled is None:
            return
        field = f"data.unlabelled={', '.join(self.data.unlabelled)}"
        if not self.task.needs.answers:
            raise ConfigError(
                f"{field}: is for tasks whose answer a teacher can say, labels or a number; task={self.task.name} "
                "reads whole training rows"
            )
        if not any(stage.teachers() for stage in self.stages if isinstance(stage, Taught)):
            raise ConfigError(f"{field}: has no effect without a teacher; add compression=[distill/logits]")

    @property
    def stages(self) -> list[Stage]:
        """Tuning and compression, in the order in which they act."""
        return ordered([self.tuning, *self.compression.values()])

    def plan(self) -> list[tuple[str, str]]:
        """(step, what it does) for every step that does something, in the order of the run."""
        by_phase = {phase: [s for s in self.stages if s.phase is phase] for phase in Phase}
        weights = [s for s in self.stages if s.phase.acts_on_weights]
        shaping = by_phase[Phase.VOCABULARY] + by_phase[Phase.SHAPE]
        cut = [f"keep layers {list(self.model.layers)}"] if self.model.layers else []
        objective = [f"{self.task_weight:g} x {self.task.name}", *map(describe, by_phase[Phase.OBJECTIVE])]
        steps = [
            ("load", f"{self.model.title} for {self.task.name} on {option_name(self.data)}"),
            ("shape", ", ".join(cut + [describe(s) for s in shaping]) or "as loaded"),
            ("tune", describe(self.tuning)),
            (
                "weights",
                " -> ".join(describe(s) + ("" if s.during_fit else " after the fit") for s in weights) or "dense",
            ),
            ("objective", " + ".join(objective)),
        ]
        exports = ", ".join(map(describe, self.export.values()))
        return [*steps, ("export", exports)] if exports else steps


def describe(stage: Stage | Export) -> str:
    """`prune/magnitude (sparsity 0.5, ...)`: the method and the settings that are not null."""
    shown = {f.name: getattr(stage, f.name) for f in fields(stage)}
    settings = ", ".join(f"{name} {short(value)}" for name, value in shown.items() if value not in (None, False))
    return f"{stage.name} ({settings})" if settings else stage.name


def short(value: Any) -> str:
    """A setting in few characters."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else f"...{text[-57:]}"
