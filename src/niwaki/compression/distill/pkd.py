"""Patient knowledge distillation (Sun et al. 2019, arXiv:1908.09355)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.distill.distillation import Lesson, Representation
from niwaki.compression.distill.layers import Layers, check_layers, pairs_of
from niwaki.compression.distill.states import learned, projection, summary
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import Flow
from niwaki.model.teacher import Said, Teacher
from niwaki.model.text import text_of
from niwaki.stage import Context


@dataclass(frozen=True, kw_only=True)
class PatientDistillation(Representation):
    """|| h_student / ||h_student|| - h_teacher / ||h_teacher|| ||^2 of the states of intermediate blocks; the mean over
    rows and pairs of blocks (the paper adds them up).

    uniform is PKD-Skip and last PKD-Last; both leave out the last block, whose state the logits see. `positions`:
    summary ([CLS], or the last position of the text where a model reads from left to right or its head reads the end
    token), or all of the text, for tasks with an answer at each. Where the widths differ, which the paper's do not, a
    learned map comes first, one for all blocks; it ends with the fit.
    """

    paper: ClassVar[str] = "Sun et al. 2019, arXiv:1908.09355"

    layers: Layers = "uniform"
    positions: Literal["summary", "all"] = "summary"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, f"{self.title}.layers")

    def compare_flows(self, student: Flow, teacher: Flow) -> None:
        if not self.pairs(student, teacher):
            raise ConfigError(
                f"{self.title}.layers={self.layers}: leaves out the last block, and the student has one; name pairs"
            )

    def pairs(self, student: Flow, teacher: Flow) -> list[tuple[int, int]]:
        """(student block, teacher block)."""
        pairs = pairs_of(self.layers, student.blocks, teacher.blocks, f"{self.title}.layers")
        return pairs[:-1] if isinstance(self.layers, str) else pairs

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        ours, theirs = self.outlines(context, teacher)
        maps: dict[str, nn.Module] = {
            f"{self.name}/states_{stack}": projection(one.states[-1], other.states[-1])
            for stack, (one, other) in enumerate(zip(ours.flows, theirs.flows, strict=True))
        }
        anatomies = context.anatomy, teacher.anatomy

        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            losses = []
            for stack, (one, other) in enumerate(zip(student.flows, teacher.flows, strict=True)):
                for i, j in self.pairs(one, other):
                    mine, its = self._chosen(one.states[i + 1], other.states[j + 1], anatomies, batch, stack)
                    mapped = maps[f"{self.name}/states_{stack}"](mine)
                    distance = functional.normalize(mapped, dim=-1) - functional.normalize(its, dim=-1)
                    losses.append((distance**2).sum(-1).mean())
            return torch.stack(losses).mean()

        return Lesson(compare, learned(maps))

    def _chosen(
        self,
        student: Tensor,
        teacher: Tensor,
        anatomies: tuple[Anatomy, Anatomy],
        batch: Mapping[str, Tensor],
        stack: int,
    ) -> tuple[Tensor, Tensor]:
        """The states that are compared, (count, width) of each."""
        if self.positions == "all":
            text = text_of(batch, stack > 0)
            return student[text].float(), teacher[text].float()
        return summary(student, anatomies[0], batch, stack), summary(teacher, anatomies[1], batch, stack)
