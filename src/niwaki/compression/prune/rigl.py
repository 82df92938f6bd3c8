"""RigL: sparse from the start, with connections that move (Evci et al. 2020, arXiv:1911.11134)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.prune.mask import Mask, add_to_base
from niwaki.compression.prune.pattern import Pattern, keep_largest
from niwaki.weights import entering


def share_at(step: int, last: int, fraction: float) -> float:
    """The share of the connections that moves: f(t) = a / 2 (1 + cos(pi t / T_end)), Evci et al. 2020, section 3."""
    return fraction / 2 * (1 + math.cos(math.pi * step / last))


def moves_at(step: int, first: int, last: int, interval: int) -> bool:
    """Whether connections move after optimizer step number `step`, counted from 1."""
    return first <= step < last and step % interval == 0


def moved(kept: Tensor, magnitudes: Tensor, gradients: Tensor, count: int) -> Tensor:
    """The mask (same shape) after `count` connections have moved: of those that are kept the ones of the smallest
    magnitude go; of all that are away then, these among them, the ones with the largest gradient come."""
    flat = kept.flatten()[None]
    inactive = int((~flat).sum())
    stay = keep_largest(magnitudes.flatten()[None].masked_fill(~flat, -torch.inf), inactive + count)
    away = gradients.flatten()[None].abs().masked_fill(stay, -torch.inf)
    return (stay | ~keep_smallest(away, count)).view(kept.shape)


def keep_smallest(scores: Tensor, drop: int) -> Tensor:
    """Per row of `scores` (rows, n): False at exactly the `drop` highest."""
    return keep_largest(-scores, drop)


class RigL(pl.Callback):
    """Every `interval` optimizer steps, from `first` to before `last`, moves a share of each mask's connections. New
    ones begin at zero, with no momentum. The gradient is that of the step just made, of all weights, masked or not;
    where the paper leaves the optimizer's step out at such a moment, here it is made."""

    def __init__(
        self,
        masks: Mapping[nn.Linear, Mask],
        *,
        pattern: Pattern,
        fraction: float,
        first: int,
        last: int,
        interval: int,
    ) -> None:
        self.masks = masks
        self.pattern = pattern
        self.fraction = fraction
        self.first = first
        self.last = last
        self.interval = interval
        self._done = -1
        self._gradients: dict[Mask, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether connections have still to move after this optimizer step."""
        return moves_at(step, self.first, self.last, self.interval) and step > max(self._done, 0)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        wanted = self.due(trainer.global_step + 1)
        for mask in self.masks.values():
            mask.watcher = self._gather_into(mask) if wanted else None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.due(trainer.global_step):
            self.move(trainer.global_step, trainer.optimizers)

    def move(self, step: int, optimizers: list[Any]) -> None:
        """Move connections by the gradients that were gathered."""
        self._done = step
        for linear, mask in self.masks.items():
            if mask not in self._gradients:  # nothing there learns yet
                continue
            weight, kept = entering(linear, mask), self.pattern.pool(mask.mask.float()) > 0.5
            magnitudes, gradients = self.pattern.pool(weight.abs()), self.pattern.pool(self._gradients[mask].abs())
            count = round(share_at(step, self.last, self.fraction) * int(kept.sum()))
            new = self.pattern.spread(moved(kept, magnitudes, gradients, count))
            grown = new & ~mask.mask
            add_to_base(linear, torch.where(grown, -weight, 0.0))
            forget(optimizers, linear, grown)
            mask.take(new)
        self._gradients = {}

    def _gather_into(self, mask: Mask) -> Any:
        def gather(gradient: Tensor, weight: Tensor) -> None:
            self._gradients[mask] = self._gradients[mask] + gradient if mask in self._gradients else gradient.detach()

        return gather

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]


def forget(optimizers: list[Any], linear: Any, where: Tensor) -> None:
    """Set what the optimizers keep of these elements of the base weight to zero."""
    base = linear.parametrizations["weight"].original
    for optimizer in optimizers:
        for value in optimizer.state.get(base, {}).values():
            if type(value) is Tensor and value.shape == where.shape:
                value.masked_fill_(where, 0.0)
