"""Distillation of the output distribution (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from niwaki.compression.distill import divergence
from niwaki.compression.distill.answers import Kept, RememberedLogits, RememberedTerm, Targets
from niwaki.compression.distill.distillation import Compared, Distillation, Lesson, Term
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.teacher import Said, Taught, Teacher, places_of, plainly, the_one
from niwaki.stage import Context, Effects, Stage

LARGEST_PART = 2**24  # numbers of either side that are compared at once


@dataclass(frozen=True, kw_only=True)
class Logits(Compared):
    """weight * T^2 * D(softmax(z_teacher / T), softmax(z_student / T)), mean over the positions that count.

    D, with p the teacher and q the student: forward_kl KL(p || q); reverse_kl KL(q || p); jensen_shannon, `beta`
    KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al. 2023, arXiv:2306.13649); skewed_kl
    KL(p || alpha p + (1 - alpha) q), skewed_reverse_kl KL(q || alpha q + (1 - alpha) p) (Ko et al. 2024,
    arXiv:2402.03898).
    Of a task whose answer is a number the two sides are normal distributions of variance 1 around theirs: half the
    squared difference, whatever the temperature.
    `top_k`: of the classes that the teacher finds likeliest, and all others as one. `cache`: what the teacher says of
    the training rows is computed once, kept on disk and used again, by later runs too. The task's own loss is weighed
    by `task_weight` at the root of the config (0 learns from the teacher alone).
    `more_teachers` beside `teacher`: p is then the mean of their softened distributions, each weighed by its share of
    `teacher_weights` (that of `teacher` first; null: all alike). They are hub names, folders or artifacts with the same
    labels and vocabulary, run in the same `precision`, and teach this term alone.
    """

    paper: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"

    temperature: float = 2.0
    divergence: divergence.Name = "forward_kl"
    beta: float | None = None
    alpha: float | None = None
    top_k: int | None = None
    cache: bool = False
    more_teachers: Sequence[str] | None = None
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
        """Raise ConfigError for more teachers that are none, or weights that do not fit them."""
        more, weights, field = self.more_teachers, self.teacher_weights, f"{self.title}.more_teachers"
        if isinstance(more, str) or (more is not None and not all(more)) or more == []:
            raise ConfigError(f"{field}={more!r}: needs null or a list of hub names, folders or artifacts, such as [a]")
        places = [self.teacher, *(more or ())]
        if "auto" in (more or ()):
            raise ConfigError(f"{field}={list(more or ())}: auto is for {self.title}.teacher")
        if more and self.cache:
            raise ConfigError(f"{self.title}.cache=true and {field}: what is kept is of one teacher; leave one out")
        if weights is not None and not (len(weights) == len(places) > 1 and min(weights) > 0):
            raise ConfigError(
                f"{self.title}.teacher_weights={list(weights)}: needs a number above 0 for each of several teachers, "
                f"teacher and more_teachers, here {len(places)}; or null"
            )

    def twice(self, others: Sequence[Stage]) -> str | None:
        """Say so where a teacher would count twice in the mean."""
        places = [plainly(place) for place in (self.teacher or the_one(others), *(self.more_teachers or ()))]
        again = [place for number, place in enumerate(places) if place in places[:number]]
        return f"{self.title}.more_teachers: {again[0]!r} stands twice; once is enough" if again else None

    def teachers(self) -> dict[str, str]:
        more = {f"{self.title}.more_teachers[{number}]": place for number, place in enumerate(self.more_teachers or ())}
        return super().teachers() | more

    def conflict(self, others: Sequence[Stage]) -> str | None:
        taught = [o for o in others if isinstance(o, Distillation) or (isinstance(o, Taught) and o.teachers())]
        retelling = [o.name for o in taught if not o.adds_term]
        if self.cache and retelling:
            return (
                f"{self.title}.cache=true and {retelling[0]}: what is kept is of the rows as they are, and other texts "
                "stand in them then; leave it false"
            )
        if reason := super().conflict(others):
            return reason
        if self.cache:
            own = places_of(self, others)
            sharing = [other.name for other in taught if own & places_of(other, [self, *others])]
            if sharing:
                return (
                    f"{self.title}.cache=true and {sharing[0]}: the teacher runs for the other term anyway; leave it "
                    "false"
                )
        return self.twice(others) if self.more_teachers else None

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if self.cache and anatomy.fills_in:
            raise ConfigError(
                f"{self.title}.cache=true: other tokens are hidden in each epoch, of which nothing would be kept; "
                "leave it false"
            )
        classes = classes_of(anatomy)
        if self.top_k is not None and self.top_k >= classes:
            raise ConfigError(
                f"compression.logits.top_k={self.top_k}: has no effect, there are {classes} classes; leave it null"
            )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        if self.more_teachers:
            named = {f"{self.title}.teacher": self.teacher, **self.teachers()}
            teachers = [context.load_teacher(place, field) for field, place in named.items()]
            compare_all = partial(self.compare_all, context=context)
            return Effects(terms={self.name: Term(Council(teachers), compare_all, self.weight)})
        if not self.cache:
            return super().prepare(model, context)
        teacher = context.load_teacher(self.teacher, f"{self.title}.teacher")
        classes = min(map(classes_of, (context.anatomy, teacher.anatomy)))
        kept = Kept(classes=classes, top_k=self.top_k, temperature=self.temperature if self.top_k else None)
        answers = RememberedLogits(teacher, context, kept, f"{self.title}.cache")
        compare = partial(self.compare_remembered, classes=classes)
        return Effects(terms={self.name: RememberedTerm(answers, context, compare, self.weight)})

    def compare_remembered(self, student: Tensor, said: Targets, classes: int) -> Tensor:
        """The same divergence, from what was kept of the teacher, over so many classes."""
        if said.places is None:
            return softened_divergence(student, said.values, self.temperature, self.measure())

        def compare(student: Tensor, values: Tensor, places: Tensor) -> Tensor:
            logs = functional.log_softmax(student[:, :classes].float() / self.temperature, dim=-1)
            return self.temperature**2 * self.measure()(divergence.with_rest(logs, places), values)

        return in_parts(compare, student, said.values, said.places)

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            ours, theirs = (context.predictions(said.outputs, batch) for said in (student, teacher))
            return softened_divergence(ours, theirs, self.temperature, self.measure(), self.top_k)

        return Lesson(compare)

    def compare_all(
        self, student: Said, teachers: Iterator[Said], batch: Mapping[str, Tensor], context: Context
    ) -> Tensor:
        """The same divergence from the mean of what several teachers say."""
        ours = context.predictions(student.outputs, batch)
        theirs = (context.predictions(said.outputs, batch)[..., : ours.shape[-1]] for said in teachers)
        weights = self.teacher_weights or [1.0] * (1 + len(self.more_teachers or ()))
        mean = mean_logits(theirs, weights, self.temperature)
        return softened_divergence(ours, mean, self.temperature, self.measure(), self.top_k)

    def measure(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The divergence, of the logarithms of (student, teacher)."""
        return divergence.measure_of(self.divergence, self.beta, self.alpha)


class Council:
    """Several teachers of one term."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.members = tuple(teachers)

    def __call__(self, batch: Mapping[str, Tensor]) -> Iterator[Said]:
        """What each says, one after another, so that no more than one of them is held."""
        return (member(batch) for member in self.members)


def mean_logits(logits: Iterable[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Logits (n, classes) whose softened distribution is the weighted mean of the softened distributions of several;
    over the classes that all of them have. Of numbers (n, 1) their weighted mean."""
    mean: Tensor | None = None
    for one, weight in zip(logits, weights, strict=True):
        if one.shape[-1] == 1:
            mean = one.float() * weight / sum(weights) + (0.0 if mean is None else mean)
            continue
        classes = one.shape[-1] if mean is None else min(one.shape[-1], mean.shape[-1])
        logs = functional.log_softmax(one[..., :classes].float() / temperature, dim=-1)
        logs = logs + math.log(weight / sum(weights))
        mean = logs if mean is None else torch.logaddexp(mean[..., :classes], logs)
    assert mean is not None
    return mean if mean.shape[-1] == 1 else temperature * mean


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
    logits (n, classes). Classes that only one has are none: embeddings are often padded behind the vocabulary. With
    one class, a number, half the squared difference."""
    classes = min(student.shape[-1], teacher.shape[-1])

    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        if classes == 1:
            return divergence.of_numbers(student.float(), teacher.float())
        logs = [
            functional.log_softmax(logits[..., :classes].float() / temperature, dim=-1) for logits in (student, teacher)
        ]
        ours, theirs = divergence.top_and_rest(logs[0], logs[1], top_k) if top_k else logs
        found = measure(ours, theirs) if measure else divergence.kl(theirs, ours)
        return temperature**2 * found

    return in_parts(compare, student, teacher)


def in_parts(compare: Callable[..., Tensor], *sides: Tensor) -> Tensor:
    """`compare`, a mean over rows, of these (n, ...). Where that takes more than LARGEST_PART numbers, some rows at a
    time, of which nothing but the given is kept for the gradient: with the tokens of a language model for classes, a
    logarithm of the probabilities of either side is as large as all that the model keeps of its blocks."""
    count, most = len(sides[0]), max(1, LARGEST_PART // max(side.shape[-1] for side in sides))
    if count <= most:
        return compare(*sides)
    parts = list(zip(*(side.split(most) for side in sides), strict=True))
    sums = [len(part[0]) * checkpoint(compare, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum() / count
