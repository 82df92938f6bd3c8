"""Distillation of hidden states (TinyBERT, Jiao et al. 2020, arXiv:1909.10351)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.distill.distillation import Lesson, Representation
from niwaki.compression.distill.layers import Layers, check_layers, pairs_of
from niwaki.compression.distill.states import learned, mean_over, projection
from niwaki.model.capture import Flow
from niwaki.model.teacher import Said, Teacher
from niwaki.model.text import text_of
from niwaki.stage import Context


@dataclass(frozen=True, kw_only=True)
class Hidden(Representation):
    """MSE(E_student W_e, E_teacher), and MSE(H_student W_h, H_teacher) of the outputs of paired blocks.

    The mean over the positions of the text and the width, then over the pairs (the paper adds them up). With
    `embeddings` what enters the first block is one of the pairs. W_e and W_h, one for all blocks, are learned where the
    widths differ, and end with the fit. A final norm, where a family has one, is behind the last block's output.
    """

    paper: ClassVar[str] = "Jiao et al. 2020, arXiv:1909.10351"

    layers: Layers = "uniform"
    embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, f"{self.title}.layers")

    def compare_flows(self, student: Flow, teacher: Flow) -> None:
        self.pairs(student, teacher)

    def pairs(self, student: Flow, teacher: Flow) -> list[tuple[int, int]]:
        """(student block, teacher block)."""
        return pairs_of(self.layers, student.blocks, teacher.blocks, f"{self.title}.layers")

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        ours, theirs = self.outlines(context, teacher)
        maps: dict[str, nn.Module] = {}
        for stack, (one, other) in enumerate(zip(ours.flows, theirs.flows, strict=True)):
            if self.embeddings:
                maps[f"{self.name}/embeddings_{stack}"] = projection(one.states[0], other.states[0])
            maps[f"{self.name}/states_{stack}"] = projection(one.states[-1], other.states[-1])

        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            losses = []
            for stack, (one, other) in enumerate(zip(student.flows, teacher.flows, strict=True)):
                text = text_of(batch, stack > 0)[..., None]
                places = [("states", i + 1, j + 1) for i, j in self.pairs(one, other)]
                for kind, i, j in [*([("embeddings", 0, 0)] if self.embeddings else []), *places]:
                    mapped = maps[f"{self.name}/{kind}_{stack}"](one.states[i].float())
                    losses.append(mean_over((mapped - other.states[j].float()) ** 2, text))
            return torch.stack(losses).mean()

        return Lesson(compare, learned(maps))
