"""Distillation across vocabularies: universal logit distillation (Boizard et al. 2024, arXiv:2402.12030)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.distill.distillation import Compared, Lesson
from niwaki.compression.distill.logits import softened_divergence
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.teacher import Said, Teacher
from niwaki.stage import Context, Stage


@dataclass(frozen=True, kw_only=True)
class CrossVocabulary(Compared):
    """weight * sum_i |p_(i) - q_(i)|, the mean over positions, with p_(1) >= p_(2) >= ... the teacher's probabilities
    and q_(i) the student's, and zeros where one has fewer: the Wasserstein distance of two distributions whose classes
    are all as far from one another.

    The teacher reads the same training rows in its own tokens. Position by position, as in the paper, the two texts
    are compared as far as the shorter one goes; word by word where each word has an answer. Where the classes are
    labels, and so the same, it is their KL divergence at `temperature`, as in distill/logits. The paper's temperature
    is 1.
    """

    paper: ClassVar[str] = "Boizard et al. 2024, arXiv:2402.12030"
    own_tokens: ClassVar[bool] = True

    weight: float = 1.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"{self.title}.temperature={self.temperature}: needs a number above 0")

    def conflict(self, others: Sequence[Stage]) -> str | None:
        if self.teacher in (None, "auto"):  # one that is tuned first has the student's vocabulary
            return f"{self.title}.teacher: needs a hub name, a folder, or an artifact with another vocabulary"
        return super().conflict(others)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if anatomy.fills_in:
            raise ConfigError(
                "distill/cross_vocabulary: what is hidden from the student stands elsewhere in the tokens of another "
                "vocabulary; needs a task other than masked_lm, or a teacher of the same one with distill/logits"
            )

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        assert self.teacher is not None
        teacher.reader = context.read_by(self.teacher)
        tokens = context.anatomy.model.get_output_embeddings() is not None  # type: ignore[operator]
        distance = self.compare_tokens if tokens else self.compare_labels

        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            logits, *places = placed(context, student.outputs, batch)
            others, *their_places = placed(context, teacher.outputs, teacher.batch)
            ours, theirs = shared_places(places, their_places)
            return distance(logits[ours], others[theirs])

        return Lesson(compare)

    def compare_tokens(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of the sorted probabilities, mean over positions; both logits (positions, classes)."""
        chances = [torch.softmax(logits.float() / self.temperature, dim=-1) for logits in (student, teacher)]
        width = max(one.shape[-1] for one in chances)
        ours, theirs = (functional.pad(one, (0, width - one.shape[-1])).sort(-1, descending=True)[0] for one in chances)
        return (ours - theirs).abs().sum(-1).mean()

    def compare_labels(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence of the same classes."""
        return softened_divergence(student, teacher, self.temperature)


def placed(context: Context, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (positions, classes) of the positions that count, the row of each, and its number there: of the word, as
    `words` (rows, positions) has it where a task gives one, for not every tokenizer has a piece of each; else from the
    row's start."""
    logits, rows = context.predictions(outputs, batch), context.owners(outputs, batch)
    if "words" in batch:
        return logits, rows, context.predictions(SimpleNamespace(logits=batch["words"][..., None]), batch)[:, 0]
    return logits, rows, from_start(rows)


def from_start(rows: Tensor) -> Tensor:
    """The number of each position in its row, where those of a row stand together and the rows are in order."""
    counts = torch.bincount(rows)
    return torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]


def shared_places(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Which positions to compare, of two lists (row of each, number of each in its row), both in this order: those
    that both have."""
    width = max(int(numbers.max()) for _, numbers in (first, second)) + 1
    ours, theirs = (rows * width + numbers for rows, numbers in (first, second))
    return torch.isin(ours, theirs).nonzero().flatten(), torch.isin(theirs, ours).nonzero().flatten()
