"""Distillation of attention scores (TinyBERT, Jiao et al. 2020, arXiv:1909.10351)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from niwaki.compression.distill.distillation import Lesson, Representation
from niwaki.compression.distill.layers import Layers, check_layers, pairs_of
from niwaki.compression.distill.states import mean_over
from niwaki.errors import ConfigError
from niwaki.model.capture import Attention as Compared
from niwaki.model.capture import Flow
from niwaki.model.teacher import Said, Teacher
from niwaki.model.text import text_of
from niwaki.stage import Context


@dataclass(frozen=True, kw_only=True)
class Attention(Representation):
    """1/h sum_i MSE(A_i student, A_i teacher) of the scores q k^T / sqrt(d) of h heads, before the softmax.

    The mean over the heads and those pairs of positions of the text where both models attend from one to the other,
    then over the paired blocks (the paper adds them up). Attention of the text to itself; that of a decoder to its
    encoder is left out.
    """

    paper: ClassVar[str] = "Jiao et al. 2020, arXiv:1909.10351"
    attention: ClassVar[bool] = True
    states: ClassVar[bool] = False

    layers: Layers = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, f"{self.title}.layers")

    def compare_flows(self, student: Flow, teacher: Flow) -> None:
        for i, j in self.pairs(student, teacher):
            ours, theirs = student.attentions[i].query.shape[1], teacher.attentions[j].query.shape[1]
            if ours != theirs:
                raise ConfigError(
                    f"compression.attention: block {i} of the student has {ours} attention heads, block {j} of the "
                    f"teacher {theirs}, and scores are compared head by head; use distill/minilm"
                )

    def pairs(self, student: Flow, teacher: Flow) -> list[tuple[int, int]]:
        """(student block, teacher block)."""
        return pairs_of(self.layers, student.blocks, teacher.blocks, f"{self.title}.layers")

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        self.outlines(context, teacher)

        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            losses = [
                squared_error(one.attentions[i], other.attentions[j], text_of(batch, stack > 0))
                for stack, (one, other) in enumerate(zip(student.flows, teacher.flows, strict=True))
                for i, j in self.pairs(one, other)
            ]
            return torch.stack(losses).mean()

        return Lesson(compare)


def squared_error(student: Compared, teacher: Compared, text: Tensor) -> Tensor:
    """Mean squared difference of the scores where both are used; `text` (rows, positions)."""
    used = text[:, None, :, None] & text[:, None, None, :] & student.seen() & teacher.seen()
    return mean_over((student.scores() - teacher.scores()) ** 2, used)
