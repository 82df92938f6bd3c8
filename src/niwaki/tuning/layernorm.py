"""LayerNorm tuning: only the norms and the head learn (Qi et al. 2022, arXiv:2211.08682; Zhao et al. 2023,
arXiv:2312.11420)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.depth import norm_parameters
from niwaki.stage import Context, Effects, Tuning
from niwaki.tuning.freeze import train_only


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Tuning):
    """Train g and b of every norm, y = g (x - mean) / deviation + b (without mean and b in an RMSNorm), in the
    blocks, below and above them, and the head where it is new."""

    paper: ClassVar[str] = "Qi et al. 2022, arXiv:2211.08682; Zhao et al. 2023, arXiv:2312.11420"
    trains_base: ClassVar[bool] = False
    moves_linears: ClassVar[bool] = False

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if not norm_parameters(anatomy.backbone):
            kind = anatomy.model.config.model_type  # type: ignore[union-attr]
            raise ConfigError(
                f"tuning=layernorm: the norms of this {kind} model have no weights; use tuning=lora or full"
            )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        head = context.new_head
        train_only(model, [*norm_parameters(context.anatomy.backbone).values(), *head])
        return Effects()
