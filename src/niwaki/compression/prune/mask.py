"""Masks as links of the weight chain: what is kept, drawn from scores on a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.prune.pattern import Pattern, Selection, keep_largest
from niwaki.stage import Phase
from niwaki.weights import Link, entering, stack

__all__ = ["Mask", "MaskSchedule", "Pattern", "add_to_base", "cubic", "keep_largest", "mask_targets"]

Watcher = Callable[[Tensor, Tensor], None]
"""(gradient of the masked weight, weight that enters the mask), both (out, in) and dense."""


class Mask(Link):
    """w -> w * mask, mask (out, in) of booleans. Gradients of masked weights are zero."""

    phase = Phase.PRUNE
    mask: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=device))
        self.watcher: Watcher | None = None  # is shown the dense gradient, where a schedule or a score asks for it

    def forward(self, weight: Tensor) -> Tensor:
        # bytes convert to floats several times faster than booleans do
        return self.watched(weight * self.mask.view(torch.uint8).to(weight.dtype), weight)

    def watched(self, kept: Tensor, weight: Tensor) -> Tensor:
        """`kept`, the masked weight, with its gradient shown to the watcher; a frozen one has a gradient for that."""
        if self.watcher is None or not torch.is_grad_enabled():
            return kept
        kept = kept if kept.requires_grad else kept.requires_grad_()
        kept.register_hook(partial(show, self.watcher, weight.detach()))
        return kept

    def take(self, kept: Tensor) -> None:
        """Make `kept` (out, in) the mask."""
        self.mask.copy_(kept)

    def kept(self) -> Tensor:
        return self.mask

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        return {"mask": self.mask.clone()}


def show(watcher: Watcher, weight: Tensor, gradient: Tensor) -> None:
    """A backward hook's business, which may not return anything."""
    watcher(gradient, weight)


def mask_targets(targets: Mapping[str, nn.Linear], kind: type[Mask]) -> dict[nn.Linear, Any]:
    """Stack a mask of ones, of this kind, on every target."""
    masks = {}
    for linear in targets.values():
        masks[linear] = kind(linear.weight.shape, linear.weight.device)
        stack(linear, masks[linear])
    return masks


def add_to_base(linear: nn.Linear, change: Tensor) -> None:
    """w <- w + change (out, in) on the base weight, whether it learns or not; below an additive delta the sum changes
    by as much."""
    chains: Any = linear.parametrizations
    with torch.no_grad():
        chains["weight"].original.add_(change)


def cubic(final: float, begin: float, end: float, steps: int) -> Callable[[int], float]:
    """Sparsity at an optimizer step: s (1 - (1 - t)^3), t from 0 at `begin` to 1 at `end` (fractions of `steps`).
    Zhu & Gupta 2017, equation 1, from an initial sparsity of 0."""
    first, last = begin * steps, max(round(end * steps), 1)

    def sparsity(step: int) -> float:
        if step >= last:
            return final
        t = max((step - first) / max(last - first, 1e-9), 0.0)
        return final * (1 - (1 - t) ** 3)

    return sparsity


class MaskSchedule(pl.Callback):
    """Draws the masks anew from the weights that enter them, every `interval` optimizer steps until `last_step`."""

    def __init__(
        self,
        masks: Mapping[nn.Linear, Mask],
        *,
        score: Callable[[Tensor, Any], Tensor],
        selection: Selection,
        progress: Callable[[int], float],
        last_step: int,
        interval: int,
    ) -> None:
        self.masks = masks
        self.score = score  # (weight that enters, its mask) -> (out, in)
        self.selection = selection
        self.progress = progress  # optimizer step -> share of the final sparsity
        self.last_step = last_step
        self.interval = interval
        self._drawn = -1

    def draw(self, step: int) -> None:
        """Set every mask for this optimizer step."""
        self._drawn = step
        scores = {mask: self.score(entering(linear, mask), mask) for linear, mask in self.masks.items()}
        self.selection.draw(scores, self.progress(step))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        due = step % self.interval == 0 or step == self.last_step
        if due and self._drawn < step <= self.last_step:
            self.draw(step)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn = state_dict["drawn"]
