"""Distillation across vocabularies: universal logit distillation (Boizard et al. 2024, arXiv:2402.12030)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.distill.distillation import Compared, Lesson
from niwaki.compression.distill.logits import softened_divergence
from niwaki.compression.distill.states import owned
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
    are compared as far as the shorter one goes. Where the classes are labels, and so the same, it is their KL
    divergence at `temperature`, as in distill/logits. The paper's temperature is 1.
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
            order = torch.arange(len(batch["row"]), device=batch["row"].device)
            logits, rows = owned(context.predictions, student.outputs, batch, order)
            others, their_rows = owned(context.predictions, teacher.outputs, teacher.batch, order)
            ours, theirs = shared_places(rows, their_rows)
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


def shared_places(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions to compare, of two lists of their rows (n,), (m,), where each row's positions stand together and
    the rows are in one order: of each row as many from its start as both have."""
    rows = int(max(first.max(), second.max())) + 1
    counts = [torch.bincount(one, minlength=rows) for one in (first, second)]
    both = torch.minimum(*counts)
    chosen = []
    for owners, count in zip((first, second), counts, strict=True):
        place = torch.arange(len(owners), device=owners.device) - (count.cumsum(0) - count)[owners]
        chosen.append((place < both[owners]).nonzero().flatten())
    return chosen[0], chosen[1]
