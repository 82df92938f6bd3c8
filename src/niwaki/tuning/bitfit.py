"""BitFit: only the biases and the head learn (Ben Zaken et al. 2021, arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Tuning
from niwaki.tuning.freeze import train_only


def biases(anatomy: Anatomy) -> list[nn.Parameter]:
    """The bias terms of the backbone."""
    return [p for name, p in anatomy.backbone.named_parameters() if name.rpartition(".")[2] == "bias"]


@dataclass(frozen=True, kw_only=True)
class BitFit(Tuning):
    """Train b of every y = W x + b and of every norm, and the head, with its pooler, where that is new."""

    paper: ClassVar[str] = "Ben Zaken et al. 2021, arXiv:2106.10199"
    trains_base: ClassVar[bool] = False
    moves_linears: ClassVar[bool] = False

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if not biases(anatomy):
            kind = anatomy.model.config.model_type  # type: ignore[union-attr]
            raise ConfigError(f"tuning=bitfit: this {kind} model has no biases to train; use tuning=lora or full")

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        head = context.new_head
        train_only(model, [*biases(context.anatomy), *head])
        return Effects()
