"""Distillation of self-attention relations (MiniLM, Wang et al. 2020, arXiv:2002.10957; MiniLMv2, 2021,
arXiv:2012.15828)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.compression.distill.distillation import Lesson, Representation
from niwaki.compression.distill.states import mean_over
from niwaki.errors import ConfigError
from niwaki.model.capture import Attention, Flow
from niwaki.model.teacher import Said, Teacher
from niwaki.model.text import text_of
from niwaki.stage import Context

Relation = Literal["query", "key", "value"]
ATTENTION = "query_key"  # what the first paper compares in place of queries and keys by themselves


@dataclass(frozen=True, kw_only=True)
class MiniLM(Representation):
    """KL(R_teacher || R_student) of R = softmax(A A^T / sqrt(d)), for A the queries, the keys or the values of a block,
    all heads side by side, cut anew into `relation_heads` of width d.

    The last block of the student learns from the teacher's block `teacher_block` (counted from 0; null: the last). The
    mean over relation heads and positions of the text, then over `relations` (the paper adds them up). Neither widths
    nor numbers of heads have to agree; `relation_heads` (null: the teacher's attention heads) has to divide the widths.
    Queries and keys are as attention compares them, so after rotary positions; a row of R is over the whole text.
    One of `relations` may be query_key, the attention distribution softmax(Q K^T / sqrt(d)) of each head over what it
    attends to, for which student and teacher need as many heads: [query_key, value] is the loss of 2020.
    """

    paper: ClassVar[str] = "Wang et al. 2020, arXiv:2002.10957; Wang et al. 2021, arXiv:2012.15828"
    attention: ClassVar[bool] = True
    states: ClassVar[bool] = False

    relation_heads: int | None = None
    teacher_block: int | None = None
    relations: Sequence[str] = get_args(Relation)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ConfigError(f"{self.title}.relation_heads={self.relation_heads}: needs null or at least 1")
        known = (*get_args(Relation), ATTENTION)
        if not self.relations or set(self.relations) - set(known) or len(set(self.relations)) < len(self.relations):
            raise ConfigError(f"{self.title}.relations={list(self.relations)}: needs some of {', '.join(known)}")
        if self.teacher_block is not None and self.teacher_block < 0:
            raise ConfigError(f"{self.title}.teacher_block={self.teacher_block}: needs null or a block from 0 up")

    def compare_flows(self, student: Flow, teacher: Flow) -> None:
        if self.teacher_block is not None and self.teacher_block >= teacher.blocks:
            raise ConfigError(
                f"{self.title}.teacher_block={self.teacher_block}: the teacher has the blocks 0..{teacher.blocks - 1}"
            )
        counts = [flow.attentions[block].query.shape[1] for flow, block in ((student, -1), (teacher, self.block))]
        if ATTENTION in self.relations and counts[0] != counts[1]:
            raise ConfigError(
                f"{self.title}.relations={list(self.relations)}: {ATTENTION} compares head with head, and the student "
                f"has {counts[0]}, the teacher {counts[1]}; leave it out"
            )
        heads = self.heads(teacher)
        for who, flow, block in (("student", student, -1), ("teacher", teacher, self.block)):
            for relation in self.own_relations:
                width = side_by_side(getattr(flow.attentions[block], relation)).shape[-1]
                if width % heads:
                    given = "" if self.relation_heads else " (the teacher's attention heads)"
                    raise ConfigError(
                        f"{self.title}.relation_heads={heads}{given}: does not divide the {width} that the "
                        f"{relation} of the {who} is wide; name a number that does"
                    )

    @property
    def own_relations(self) -> list[str]:
        """Those of one kind of vector with itself."""
        return [relation for relation in self.relations if relation != ATTENTION]

    @property
    def block(self) -> int:
        return -1 if self.teacher_block is None else self.teacher_block

    def heads(self, teacher: Flow) -> int:
        """The relation heads."""
        return self.relation_heads or teacher.attentions[self.block].query.shape[1]

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        self.outlines(context, teacher)

        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            losses = []
            for stack, (one, other) in enumerate(zip(student.flows, teacher.flows, strict=True)):
                heads, text = self.heads(other), text_of(batch, stack > 0)
                sides = one.attentions[-1], other.attentions[self.block]
                compared = [[log_relation(getattr(side, name), heads, text) for side in sides]
                            for name in self.own_relations]  # fmt: skip
                if ATTENTION in self.relations:
                    compared.append([log_attention(side, text) for side in sides])
                for ours, theirs in compared:
                    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
                    losses.append(mean_over(divergence, text[:, None, :]))
            return torch.stack(losses).mean()

        return Lesson(compare)


def side_by_side(parts: Tensor) -> Tensor:
    """(rows, heads, positions, width) -> (rows, positions, heads * width)."""
    return parts.transpose(1, 2).flatten(2)


def log_relation(parts: Tensor, heads: int, text: Tensor) -> Tensor:
    """log softmax(A A^T / sqrt(d)) over the text, 0 at padding: (rows, heads, positions, positions)."""
    whole = side_by_side(parts).float()
    cut = whole.unflatten(-1, (heads, -1)).transpose(1, 2)
    return log_softmax_over(cut @ cut.transpose(2, 3) / cut.shape[-1] ** 0.5, text[:, None, None, :])


def log_attention(attention: Attention, text: Tensor) -> Tensor:
    """log of what each position of the text attends to, 0 where it looks at nothing: (rows, heads, positions,
    positions)."""
    return log_softmax_over(attention.scores(), attention.seen() & text[:, None, None, :])


def log_softmax_over(scores: Tensor, places: Tensor) -> Tensor:
    """log softmax over these places of the last axis, 0 at the others; all are 0 where there are none."""
    logs = functional.log_softmax(scores.masked_fill(~places, torch.finfo(scores.dtype).min), dim=-1)
    return logs.masked_fill(~places, 0.0)
