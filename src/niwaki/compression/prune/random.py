"""Random pruning: the baseline that every score has to beat, and RigL's start (Evci et al. 2020, arXiv:1911.11134)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from niwaki.compression.prune.mask import Mask
from niwaki.compression.prune.scheduled import Masks, Scheduled
from niwaki.stage import Context


class RandomMask(Mask):
    """A mask whose scores are the same numbers each time, so that a weight that went stays away."""

    seed: int = 0

    def numbers(self) -> Tensor:
        """Uniform in 0..1, (out, in)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.mask.shape, generator=generator).to(self.mask.device)


@dataclass(frozen=True, kw_only=True)
class Random(Scheduled):
    """Keep weights by chance: the score of each is a number drawn once, with the seed of the run."""

    kind: ClassVar[type[Mask]] = RandomMask
    paper: ClassVar[str] = "Evci et al. 2020, arXiv:1911.11134"

    def ready(self, masks: Masks, context: Context) -> None:
        generator = torch.Generator().manual_seed(context.seed)
        for _, mask in masks.values():
            mask.seed = int(torch.randint(2**62, (), generator=generator))

    def score(self, weight: Tensor, mask: Any) -> Tensor:
        numbers: Tensor = mask.numbers()
        return numbers
