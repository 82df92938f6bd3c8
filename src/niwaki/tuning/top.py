"""Partial fine-tuning: only the top blocks and the head learn (Lee et al. 2019, arXiv:1911.03090)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.depth import depths, height
from niwaki.stage import Context, Effects, Tuning
from niwaki.tuning.freeze import train_only


@dataclass(frozen=True, kw_only=True)
class Top(Tuning):
    """Train the last `blocks` blocks of each stack and what stands above them: final norm, pooler and head. An output
    layer that is tied to the embeddings stays frozen with them."""

    paper: ClassVar[str] = "Lee et al. 2019, arXiv:1911.03090"

    blocks: int = 2

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ConfigError(
                f"tuning.blocks={self.blocks}: needs a whole number of at least 1; for none use tuning=head"
            )

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if self.blocks > height(anatomy):
            raise ConfigError(f"tuning.blocks={self.blocks}: this model has {height(anatomy)}; needs at most as many")

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        depth = depths(context.anatomy)
        train_only(model, [p for name, p in model.named_parameters() if depth[name] <= self.blocks])
        return Effects()
