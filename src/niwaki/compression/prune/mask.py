"""Masks as links of the weight chain: what is kept, drawn from scores by a pattern, on a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.stage import Phase
from niwaki.weights import Link, entering, stack


class Mask(Link):
    """w -> w * mask, mask (out, in) of booleans. Gradients of masked weights are zero."""

    phase = Phase.PRUNE
    mask: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        # bytes convert to floats several times faster than booleans do
        return weight * self.mask.view(torch.uint8).to(weight.dtype)

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        return {"mask": self.mask.clone()}


@dataclass(frozen=True)
class Pattern:
    """Where zeros may stand: anywhere (group 0), or all but `keep` of every `group` neighbours along the input."""

    keep: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str, field: str = "pattern") -> Pattern:
        """`unstructured` or `N:M`.

        Raises:
            ConfigError: neither, or not 0 < N < M.
        """
        if text == "unstructured":
            return cls()
        keep, colon, group = str(text).partition(":")
        if not colon or not keep.isdigit() or not group.isdigit() or not 0 < int(keep) < int(group):
            raise ConfigError(f"{field}={text!r}: needs unstructured, or N:M with N below M, such as '2:4'")
        return cls(int(keep), int(group))

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that an N:M pattern makes; 0 without one."""
        return 1 - self.keep / self.group if self.group else 0.0

    def draw(self, scores: Tensor, sparsity: float) -> Tensor:
        """The mask (same shape, booleans) that drops the lowest scores.

        Unstructured: exactly round(sparsity * n) of the n scores. N:M: the lowest ceil-free share of every group,
        floor(sparsity * M) of M, so that the pattern is whole when the sparsity has reached 1 - N/M.
        """
        if not self.group:
            return keep_largest(scores.flatten()[None], round(sparsity * scores.numel())).view(scores.shape)
        drop = int(sparsity * self.group + 1e-6)
        return keep_largest(scores.reshape(-1, self.group), drop).view(scores.shape)


def keep_largest(scores: Tensor, drop: int) -> Tensor:
    """Per row of `scores` (rows, n): False at exactly the `drop` lowest, the first ones among equals. (rows, n)."""
    if not drop:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(drop, dim=1, keepdim=True).values  # several times faster than topk of half a matrix
    low = scores <= threshold
    surplus = low.sum(1, keepdim=True) - drop
    if surplus.any():  # equals of the threshold: only as many of them go as are needed
        equal = scores == threshold
        low &= ~(equal & (equal.cumsum(1) > equal.sum(1, keepdim=True) - surplus))
    return ~low


def mask_targets(targets: Mapping[str, nn.Linear], kind: type[Mask]) -> dict[nn.Linear, Mask]:
    """Stack a mask of ones on every target."""
    masks = {}
    for linear in targets.values():
        masks[linear] = kind(linear.weight.shape, linear.weight.device)
        stack(linear, masks[linear])
    return masks


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
        score: Callable[[Tensor], Tensor],
        pattern: Pattern,
        together: bool,
        sparsity_at: Callable[[int], float],
        last_step: int,
        interval: int,
    ) -> None:
        self.masks = masks
        self.score = score
        self.pattern = pattern
        self.together = together
        self.sparsity_at = sparsity_at
        self.last_step = last_step
        self.interval = interval
        self._drawn = -1

    def draw(self, step: int) -> None:
        """Set every mask for this optimizer step."""
        self._drawn = step
        sparsity = self.sparsity_at(step)
        scores = {mask: self.score(entering(linear, mask)) for linear, mask in self.masks.items()}
        if self.together:
            kept = self.pattern.draw(torch.cat([s.flatten() for s in scores.values()]), sparsity)
            parts = kept.split([s.numel() for s in scores.values()])
            drawn = {m: part.view(s.shape) for (m, s), part in zip(scores.items(), parts, strict=True)}
        else:
            drawn = {mask: self.pattern.draw(s, sparsity) for mask, s in scores.items()}
        for mask, new in drawn.items():
            mask.mask.copy_(new)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        due = step % self.interval == 0 or step == self.last_step
        if due and self._drawn < step <= self.last_step:
            self.draw(step)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn = state_dict["drawn"]
