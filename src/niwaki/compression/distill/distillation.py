"""What all terms of distillation have in common: a teacher and its precision, a weight, and how the two sides meet."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import Flow, Recorder, Seen, outline, recorder_of, refuse_attention
from niwaki.model.teacher import Precision, Said, Taught, Teacher, places_of, plainly
from niwaki.stage import Context, Effects, Phase, Stage

Compare = Callable[[Said, Said, Mapping[str, Tensor]], Tensor]
"""(student, teacher, batch) -> scalar."""


@dataclass(frozen=True)
class Lesson:
    """How a term compares the two sides, and what learns with it beside the model."""

    compare: Compare
    modules: dict[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Distillation(Stage):
    """What a student learns from a teacher: a hub name, a folder, or an artifact of this project, with a head for the
    same task and labels. A method that names no teacher has the one that another names. A teacher that several share
    runs once for each batch, in one `precision` (null: fp32)."""

    phase: ClassVar[Phase] = Phase.OBJECTIVE
    own_tokens: ClassVar[bool] = False

    teacher: str | None = None
    precision: Precision | None = None

    @property
    def title(self) -> str:
        """`compression.hidden`: its place in a config."""
        return title_of(self)

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that it makes for the teacher to read, beside the rows."""
        return 0

    def teachers(self) -> dict[str, str]:
        """The fields that name a teacher, and where it is."""
        return {f"{self.title}.teacher": self.teacher} if self.teacher else {}

    def conflict(self, others: Sequence[Stage]) -> str | None:
        terms = [other for other in others if isinstance(other, Taught)]
        named = sorted({plainly(term.teacher) for term in terms if term.teacher})
        if self.teacher is None and len(named) != 1:
            why = f", since the other terms have different ones ({' and '.join(named[:2])})" if named else ""
            return f"{self.title}.teacher: needs a hub name, a folder, or an artifact of this project{why}"
        for term in terms:
            precisions = {self.precision, term.precision} - {None}
            if places_of(self, terms) & places_of(term, [self, *terms]) and len(precisions) > 1:
                fields = [f"{title_of(one)}.precision={one.precision}" for one in (self, term)]
                return f"{fields[0]} and {fields[1]}: they share a teacher, which runs in one precision; leave one null"
        return None

    def needs_fit(self) -> str:
        return f"{self.title}: has no effect with trainer.max_epochs=0; a student learns in a fit"


@dataclass(frozen=True, kw_only=True)
class Weighed(Distillation):
    """A loss term between the student and a teacher. Terms add up, each with its `weight`."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"{self.title}.weight={self.weight}: needs a number above 0")


@dataclass(frozen=True, kw_only=True)
class Compared(Weighed):
    """A term that compares what student and teacher make of the same rows."""

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        teacher = context.load_teacher(self.teacher, f"{self.title}.teacher")
        lesson = self.seeded_lesson(context, teacher)
        return Effects(terms={self.name: Term(teacher, lesson.compare, self.weight)}, modules=lesson.modules)

    def seeded_lesson(self, context: Context, teacher: Teacher) -> Lesson:
        """The lesson, drawn from the run's seed and from nothing that was drawn before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            return self.lesson(context, teacher)

    @abc.abstractmethod
    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        """What is compared, and how."""


@dataclass(frozen=True, kw_only=True)
class Representation(Compared):
    """A term that compares what flows through student and teacher."""

    attention: ClassVar[bool] = False  # whether it compares what their attentions compare
    states: ClassVar[bool] = True  # whether it compares the states between their blocks

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if self.attention:
            refuse_attention(anatomy, self.title)

    def compare_outlines(self, student: Seen, teacher: Seen) -> None:
        """Raise ConfigError where what flows through the two cannot be compared, by its shapes."""
        if len(student.flows) != len(teacher.flows):
            kinds = [
                "an encoder and a decoder" if len(s.flows) > 1 else "one stack of blocks" for s in (student, teacher)
            ]
            raise ConfigError(f"{self.title}: the student is {kinds[0]}, the teacher {kinds[1]}; use distill/logits")
        for ours, theirs in zip(student.flows, teacher.flows, strict=True):
            if self.attention and not theirs.attentions:
                raise ConfigError(
                    f"{self.title}: the teacher computes its attention in a way of its own, which tells no queries and "
                    "keys; use distill/hidden"
                )
            self.compare_flows(ours, theirs)

    def compare_flows(self, student: Flow, teacher: Flow) -> None:
        """Raise ConfigError where two stacks of blocks cannot be compared."""
        return None

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        if not learns_below_head(context.anatomy):
            raise ConfigError(
                f"{self.title}: has no effect, since nothing below the head learns; use distill/logits instead"
            )
        teacher = context.load_teacher(self.teacher, f"{self.title}.teacher")
        lesson = self.seeded_lesson(context, teacher)
        return inside(
            context.anatomy, teacher, self.name, lesson, self.weight, attention=self.attention, states=self.states
        )

    def outlines(self, context: Context, teacher: Teacher) -> tuple[Seen, Seen]:
        """The shapes of what flows through student and teacher, which can be compared."""
        ours, theirs = outline(context.anatomy), outline(teacher.anatomy)
        self.compare_outlines(ours, theirs)
        return ours, theirs


def inside(
    anatomy: Anatomy, teacher: Teacher, name: str, lesson: Lesson, weight: float, *, attention: bool = False,
    states: bool = True,
) -> Effects:  # fmt: skip
    """A term on what flows through a student and its teacher, both of which are watched until the fit ends."""
    teacher.watch(attention=attention, states=states)
    recorder = recorder_of(anatomy)
    recorder.watch_states(states)
    if attention:
        recorder.watch_attention()
    return Effects(
        terms={name: Term(teacher, lesson.compare, weight, recorder)}, modules=lesson.modules,
        callbacks=[Unhook(recorder)],
    )  # fmt: skip


def title_of(stage: Any) -> str:
    """`compression.hidden`: the place of a stage in a config."""
    return f"compression.{stage.name.rpartition('/')[2]}"


class Term:
    """weight * what `compare` finds. It holds the teacher, outside of every module."""

    def __init__(
        self, teacher: Callable[[Mapping[str, Tensor]], Any], compare: Callable[..., Tensor], weight: float,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        self.teacher = teacher
        self.compare = compare
        self.weight = weight
        self.recorder = recorder

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        said = self.teacher(batch)
        student = Said(outputs, self.recorder.seen if self.recorder else None)
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return self.weight * self.compare(student, said, batch)


class Unhook(pl.Callback):
    """Takes the recorder off the model when the fit has ended."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._recorder.remove()


def learns_below_head(anatomy: Anatomy) -> bool:
    """Whether something learns that changes the states of the blocks; an embedding that is tied to the head does."""
    head = {id(p) for p in anatomy.head_parameters().values()} - {id(p) for p in anatomy.embeddings.parameters()}
    return any(p.requires_grad and id(p) not in head for p in anatomy.model.parameters())
