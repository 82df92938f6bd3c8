"""Distillation of the last hidden states' direction (DistilBERT, Sanh et al. 2019, arXiv:1910.01108)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from niwaki.compression.distill.distillation import Lesson, Representation
from niwaki.compression.distill.states import learned, mean_over, projection
from niwaki.model.capture import Seen
from niwaki.model.teacher import Said, Teacher
from niwaki.model.text import text_of
from niwaki.stage import Context


@dataclass(frozen=True, kw_only=True)
class Cosine(Representation):
    """1 - cos(h_student, h_teacher), the mean over the positions of the text. h: what leaves the backbone, after its
    final norm; of encoder and decoder, what leaves the decoder. Where the widths differ, which the paper's do not, a
    learned map W comes first, cos(h_student W, h_teacher); it ends with the fit.
    """

    paper: ClassVar[str] = "Sanh et al. 2019, arXiv:1910.01108"
    states: ClassVar[bool] = False

    def compare_outlines(self, student: Seen, teacher: Seen) -> None:
        return None

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        ours, theirs = self.outlines(context, teacher)
        mapped = projection(ours.last, theirs.last)

        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            alike = functional.cosine_similarity(mapped(student.last.float()), teacher.last.float(), dim=-1)
            return mean_over(1 - alike, text_of(batch, decoder=True))

        return Lesson(compare, learned({self.name: mapped}))
