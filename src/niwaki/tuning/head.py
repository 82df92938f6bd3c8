"""Linear probing: only the head (and the pooler below it) learns (Alain & Bengio 2016, arXiv:1610.01644)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Tuning
from niwaki.tuning.freeze import train_only


@dataclass(frozen=True, kw_only=True)
class Head(Tuning):
    """Train the head, with the pooler below it where there is one; the blocks' final norm stays as it is. In a language
    model with tied embeddings the head is the embedding too."""

    paper: ClassVar[str] = "Alain & Bengio 2016, arXiv:1610.01644"
    trains_base: ClassVar[bool] = False
    moves_linears: ClassVar[bool] = False

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if not anatomy.head_parameters():
            raise ConfigError("tuning=head: this model has no head with weights that learn; use tuning=full or lora")

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        train_only(model, context.anatomy.head_parameters().values())
        return Effects()
