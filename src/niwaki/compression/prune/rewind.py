"""Iterative pruning with rewinding: prune, put what learns back to where it was early in the fit, train on
(the lottery ticket procedure of Frankle & Carbin 2019, arXiv:1803.03635; from an early step rather than the first:
Frankle et al. 2019, arXiv:1912.05671)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.average import exchange, learning
from niwaki.compression.prune.mask import Mask
from niwaki.compression.prune.pattern import Selection
from niwaki.weights import entering


def left_after(round_: int, rounds: int, sparsity: float) -> float:
    """The fraction that is left after `round_` of `rounds`, each of which drops the same share of what it finds:
    (1 - s)^(r / n)."""
    return float((1 - sparsity) ** (round_ / rounds))


class Rewinding(pl.Callback):
    """At each of the steps `ends`, drops the same share of the weights that are left, and puts everything that learns,
    in the model and beside it, back to its value at step `origin`, with an optimizer that has forgotten what it did.
    What went stays away."""

    def __init__(
        self,
        masks: Mapping[nn.Linear, Mask],
        *,
        score: Callable[[Tensor, Any], Tensor],
        selection: Selection,
        origin: int,
        ends: Sequence[int],
    ) -> None:
        self.masks = masks
        self.score = score
        self.selection = selection
        self.origin = origin
        self.ends = list(ends)
        self._done = -1
        self._values: dict[str, Tensor] = {}  # at the origin, by name in the learner

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == self.origin == 0:
            self._keep(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step <= self._done:
            return
        self._done = step
        if step == self.origin:
            self._keep(pl_module)
        if step in self.ends:
            self.prune(self.ends.index(step) + 1)
            self._rewind(trainer, pl_module)

    def prune(self, round_: int) -> None:
        """Draw the masks at the end of a round, counted from 1."""
        scores = {}
        for linear, mask in self.masks.items():
            scores[mask] = self.score(entering(linear, mask), mask).masked_fill(~mask.mask, -torch.inf)
        share = {m: 1 - left_after(round_, len(self.ends), s) for m, s in self.selection.sparsity.items()}
        Selection(self.selection.pattern, self.selection.scope, share).draw(scores)

    def _keep(self, learner: Any) -> None:
        self._values = {name: value.detach().clone() for name, value in learning(learner, learner).items()}

    def _rewind(self, trainer: pl.Trainer, learner: Any) -> None:
        exchange(learner, self._values)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, "values": dict(self._values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done, self._values = state_dict["done"], dict(state_dict["values"])
