"""Soft movement pruning: a threshold on learned scores, and a penalty that pulls them below it (Sanh et al. 2020,
arXiv:2005.07683)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.prune.mask import cubic, mask_targets
from niwaki.compression.prune.movement import ScoredMask, check_factor, learned_in_a_fit, score_rates
from niwaki.compression.prune.pattern import keep_largest
from niwaki.compression.prune.pruning import Span
from niwaki.compression.targets import Targets, check_targets, chosen
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage

LEAST = 0.005  # of each linear stays, as in the authors' code


class Threshold(pl.Callback):
    """Draws the masks, sigmoid(S) > t, every `interval` optimizer steps, and weighs the penalty, both by the step."""

    def __init__(
        self, masks: Sequence[ScoredMask], *, threshold: float, penalty: float, progress: Any, interval: int, last: int
    ) -> None:
        self.masks = list(masks)
        self.threshold = threshold
        self.penalty = penalty
        self.progress = progress  # optimizer step -> share of the final threshold and penalty
        self.interval = interval
        self.last = last
        self._drawn = -1
        self._weight = 0.0

    def draw(self, step: int) -> None:
        """Set every mask for this optimizer step."""
        self._drawn = step
        for mask in self.masks:
            mask.take(above(mask.matrix, self.threshold * self.progress(step)))

    def term(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss term: penalty(step) * mean over the linears of mean(sigmoid(S))."""
        return self._weight * torch.stack([mask.scores.sigmoid().mean() for mask in self.masks]).mean()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._weight = self.penalty * self.progress(trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if self._drawn < step and (step % self.interval == 0 or step == self.last):
            self.draw(step)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn = state_dict["drawn"]


def above(scores: Tensor, threshold: float) -> Tensor:
    """sigmoid(S) > threshold, and at least the highest half percent of the scores. (out, in)."""
    kept = scores.sigmoid() > threshold
    least = int(LEAST * scores.numel()) + 1
    if int(kept.sum()) >= least:
        return kept
    return keep_largest(scores.flatten()[None], scores.numel() - least).view(scores.shape)


@dataclass(frozen=True, kw_only=True)
class SoftMovement(Stage):
    """Movement scores S, masked where sigmoid(S) <= t, with penalty * mean(sigmoid(S)) in the loss (the mean over the
    weights of each linear, then over linears). How many weights go follows from both, and is no setting.

    `threshold` and `penalty` rise from 0 at `begin` to their whole at `end` (fractions of the fit) as 1 - (1 - t)^3.
    The mask is drawn anew every `interval` optimizer steps to the end of the fit. `targets` is as for the other scores.
    """

    phase: ClassVar[Phase] = Phase.PRUNE
    paper: ClassVar[str] = "Sanh et al. 2020, arXiv:2005.07683"

    threshold: float = 0.1
    penalty: float = 400.0
    begin: float = 0.1
    end: float = 0.8
    interval: int = 1
    lr_factor: float = 200.0
    targets: Targets = None

    def __post_init__(self) -> None:
        field = "compression.soft_movement"
        if not 0 < self.threshold < 1:
            raise ConfigError(f"{field}.threshold={self.threshold}: needs a number above 0 and below 1")
        if not self.penalty > 0:
            raise ConfigError(f"{field}.penalty={self.penalty}: needs a number above 0; without it nothing goes")
        self.span.check(field)
        check_factor(self.lr_factor, field)
        check_targets(self.targets, field)

    @property
    def span(self) -> Span:
        """Of the schedule."""
        return Span(begin=self.begin, end=self.end, interval=self.interval)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        chosen(self.targets, "compression.soft_movement", anatomy, targets)

    def needs_fit(self) -> str:
        return learned_in_a_fit("compression.soft_movement")

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        linears = chosen(self.targets, "compression.soft_movement", context.anatomy, context.targets)
        schedule = Threshold(
            list(mask_targets(linears, ScoredMask).values()), threshold=self.threshold, penalty=self.penalty,
            progress=cubic(1.0, self.begin, self.end, context.steps), interval=self.interval, last=context.steps,
        )  # fmt: skip
        schedule.draw(0)
        _, settled = self.span.steps(context.steps)
        factors = score_rates(model, self.lr_factor)
        return Effects([schedule], {"soft_movement": schedule.term}, settled=settled, lr_factors=factors)
