"""Relational knowledge distillation (Park et al. 2019, arXiv:1904.05068)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.compression.distill.distillation import Lesson, Representation
from niwaki.compression.distill.states import mean_over, pooled, summary
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import Seen
from niwaki.model.teacher import Said, Teacher
from niwaki.stage import Context


@dataclass(frozen=True, kw_only=True)
class Relational(Representation):
    """distance * mean_(i,j) huber(d_ij) + angle * mean_(i,j,k) huber(cos_ijk), of the rows of a batch.

    d_ij = ||x_i - x_j|| / the mean of all of them; cos_ijk is that of the angle at x_j between x_i and x_k; huber is
    that of the difference between student and teacher, with 1 as its bound. i, j and k are different rows, so a batch
    of one teaches nothing. x, a state of the last layer: mean, over the text, or summary, the one that a classifier
    reads. Widths do not have to agree.
    """

    paper: ClassVar[str] = "Park et al. 2019, arXiv:1904.05068"
    states: ClassVar[bool] = False

    distance: float = 1.0
    angle: float = 2.0
    pooling: Literal["mean", "summary"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("distance", "angle"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{self.title}.{name}={getattr(self, name)}: needs a number of at least 0")
        if not self.distance and not self.angle:
            raise ConfigError(f"{self.title}.distance=0: has no effect with {self.title}.angle=0; raise one")

    def compare_outlines(self, student: Seen, teacher: Seen) -> None:
        return None

    def lesson(self, context: Context, teacher: Teacher) -> Lesson:
        anatomies = context.anatomy, teacher.anatomy

        def compare(student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
            sides = zip((student, teacher), anatomies, strict=True)
            ours, theirs = (self._rows(said, anatomy, batch) for said, anatomy in sides)
            loss = 0.0 * ours.sum()
            if self.distance and len(ours) > 1:
                loss = loss + self.distance * huber_mean(distances(ours), distances(theirs))
            if self.angle and len(ours) > 2:
                loss = loss + self.angle * huber_mean(angles(ours), angles(theirs))
            return loss

        return Lesson(compare)

    def _rows(self, said: Said, anatomy: Anatomy, batch: Mapping[str, Tensor]) -> Tensor:
        """A state for each row, (rows, width)."""
        return pooled(said.last, batch) if self.pooling == "mean" else summary(said.last, anatomy, batch)


def distances(rows: Tensor) -> Tensor:
    """||x_i - x_j||, divided by the mean over all pairs: (n, n)."""
    squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    plain = squares.clamp(min=1e-12).sqrt()
    return plain / mean_over(plain, different(len(rows), 2, rows.device))


def angles(rows: Tensor) -> Tensor:
    """cos of the angle at x_j between x_i and x_k: (j, i, k)."""
    towards = functional.normalize(rows[None] - rows[:, None], dim=-1)  # [j, i] points from x_j to x_i
    return towards @ towards.transpose(1, 2)


@lru_cache(maxsize=8)
def different(count: int, order: int, device: torch.device) -> Tensor:
    """Where all of two or three indices differ: (n, n) or (n, n, n), bool. Kept, since most batches are of one size."""
    pairs = ~torch.eye(count, dtype=torch.bool, device=device)
    return pairs if order == 2 else pairs[:, :, None] & pairs[:, None, :] & pairs[None]


def huber_mean(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of x^2 / 2 up to 1, and of |x| - 1/2 beyond, with x the difference, where all indices differ."""
    losses = functional.huber_loss(student, teacher, reduction="none")
    return mean_over(losses, different(len(losses), losses.dim(), losses.device))
