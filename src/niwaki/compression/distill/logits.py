"""Distillation of the output distribution (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.distill import divergence
from niwaki.compression.distill.answers import Kept, Remembered, RememberedTerm, Targets
from niwaki.compression.distill.distillation import Compared, Distillation, Lesson, Term
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.teacher import Said, Taught, Teacher
from niwaki.stage import Context, Effects, Stage


@dataclass(frozen=True, kw_only=True)
class Logits(Compared):
    """weight * T^2 * D(softmax(z_teacher / T), softmax(z_student / T)), mean over the positions that count.

    D, with p the teacher and q the student: forward_kl KL(p || q); reverse_kl KL(q || p); jensen_shannon, `beta`
    KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al. 2023, arXiv:2306.13649); skewed_kl
    KL(p || alpha p + (1 - alpha) q), skewed_reverse_kl KL(q || alpha q + (1 - alpha) p) (Ko et al. 2024,
    arXiv:2402.03898).
    `top_k`: of the classes that the teacher finds likeliest, and all others as one. `cache`: what the teacher says of
    the training rows is computed once, kept on disk and used again, by later runs too. The task's own loss is weighed
    by `task_weight` at the root of the config (0 learns from the teacher alone).
    `also`: more teachers; p is then the mean of their softened distributions, each weighed by its share of
    `teacher_weights` (its own teacher's first; null: all alike).
    """

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"

    temperature: float = 2.0
    divergence: divergence.Name = "forward_kl"
    beta: float | None = None
    alpha: float | None = None
    top_k: int | None = None
    cache: bool = False
    also: Sequence[str] | None = None
    teacher_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"compression.logits.temperature={self.temperature}: needs a number above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"compression.logits.top_k={self.top_k}: needs null or a whole number of at least 1")
        divergence.check_shares(self.divergence, self.beta, self.alpha, self.title)
        self.check_teachers()

    def check_teachers(self) -> None:
        """Raise ConfigError for a set of teachers that is none, or weights that do not fit it."""
        also, weights = list(self.also or ()), self.teacher_weights
        places = [self.teacher, *also]
        twice = [place for number, place in enumerate(places) if place in places[:number]]
        if twice:
            raise ConfigError(f"{self.title}.also={also}: {twice[0]!r} stands twice; once is enough")
        if "auto" in also:
            raise ConfigError(f"{self.title}.also={also}: auto is for {self.title}.teacher")
        if also and self.cache:
            raise ConfigError(f"{self.title}.cache=true and also: what is kept is of one teacher; leave one out")
        if weights is not None and not (len(weights) == len(places) > 1 and min(weights) > 0):
            raise ConfigError(
                f"{self.title}.teacher_weights={list(weights)}: needs a number above 0 for each of several teachers, "
                f"teacher and also, here {len(places)}; or null"
            )

    def teachers(self) -> dict[str, str]:
        more = {f"{self.title}.also[{number}]": place for number, place in enumerate(self.also or ())}
        return super().teachers() | more

    def conflict(self, others: Sequence[Stage]) -> str | None:
        taught = [o for o in others if isinstance(o, Distillation) or (isinstance(o, Taught) and o.teachers())]
        if self.cache and taught:
            return (
                f"{self.title}.cache=true and {taught[0].name}: the teacher runs for the other term anyway; leave it "
                "false"
            )
        return super().conflict(others)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        classes = classes_of(anatomy)
        if self.top_k is not None and self.top_k >= classes:
            raise ConfigError(
                f"compression.logits.top_k={self.top_k}: has no effect, there are {classes} classes; leave it null"
            )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        if self.also:
            teachers = [context.load_teacher(self.teacher, f"{self.title}.teacher")]
            teachers += [context.load_teacher(p, f"{self.title}.also[{n}]") for n, p in enumerate(self.also)]
            compare_all = partial(self.compare_all, context=context)
            return Effects(terms={self.name: Term(Council(teachers), compare_all, self.weight)})
        if not self.cache:
            return super().prepare(model, context)
        teacher = context.load_teacher(self.teacher, f"{self.title}.teacher")
        classes = min(map(classes_of, (context.anatomy, teacher.anatomy)))
        kept = Kept(classes=classes, top_k=self.top_k, temperature=self.temperature if self.top_k else None)
        answers = Remembered(teacher, context, kept, f"{self.title}.cache")
        compare = partial(self.compare_remembered, classes=classes)
        return Effects(terms={self.name: RememberedTerm(answers, context, compare, self.weight)})

    def compare_remembered(self, student: Tensor, said: Targets, classes: int) -> Tensor:
        """The same divergence, from what was kept of the teacher, over so many classes."""
        if said.places is None:
            return softened_divergence(student, said.values, self.temperature, self.measure())
        logs = functional.log_softmax(student[:, :classes].float() / self.temperature, dim=-1)
        return self.temperature**2 * self.measure()(divergence.with_rest(logs, said.places), said.values)

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            ours, theirs = (context.predictions(said.outputs, batch) for said in (student, teacher))
            return softened_divergence(ours, theirs, self.temperature, self.measure(), self.top_k)

        return Lesson(compare)

    def compare_all(
        self, student: Said, teachers: Sequence[Said], batch: Mapping[str, Tensor], context: Context
    ) -> Tensor:
        """The same divergence from the mean of what several teachers say."""
        ours, *theirs = (context.predictions(said.outputs, batch) for said in (student, *teachers))
        mean = mean_logits(theirs, self.teacher_weights or [1.0] * len(theirs), self.temperature)
        return softened_divergence(ours, mean, self.temperature, self.measure(), self.top_k)

    def measure(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The divergence, of the logarithms of (student, teacher)."""
        return divergence.measure_of(self.divergence, self.beta, self.alpha)


class Council:
    """Several teachers that are asked at once."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.members = tuple(teachers)

    def __call__(self, batch: Mapping[str, Tensor]) -> list[Said]:
        return [member(batch) for member in self.members]


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Logits (n, classes) whose softened distribution is the weighted mean of the softened distributions of several;
    over the classes that all of them have."""
    classes, total = min(one.shape[-1] for one in logits), sum(weights)
    logs = [
        functional.log_softmax(one[..., :classes].float() / temperature, dim=-1) + math.log(weight / total)
        for one, weight in zip(logits, weights, strict=True)
    ]
    return temperature * torch.logsumexp(torch.stack(logs), dim=0)


def classes_of(anatomy: Anatomy) -> int:
    """The classes that a model tells apart: labels, or tokens."""
    model: Any = anatomy.model
    output = model.get_output_embeddings()
    return int(model.config.num_labels if output is None else output.weight.shape[0])


def softened_divergence(
    student: Tensor, teacher: Tensor, temperature: float,
    measure: Callable[[Tensor, Tensor], Tensor] | None = None, top_k: int | None = None,
) -> Tensor:  # fmt: skip
    """T^2 times the divergence of the softened distributions (forward KL unless told otherwise), mean over rows; both
    logits (n, classes). Classes that only one has are none: embeddings are often padded behind the vocabulary."""
    classes = min(student.shape[-1], teacher.shape[-1])
    logs = [
        functional.log_softmax(logits[..., :classes].float() / temperature, dim=-1) for logits in (student, teacher)
    ]
    ours, theirs = divergence.top_and_rest(logs[0], logs[1], top_k) if top_k else logs
    found = measure(ours, theirs) if measure else divergence.kl(theirs, ours)
    return temperature**2 * found
