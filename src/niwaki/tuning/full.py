"""Full fine-tuning: every parameter learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.stage import Context, Effects, Tuning


@dataclass(frozen=True, kw_only=True)
class Full(Tuning):
    """Train all of W."""

    paper: ClassVar[str] = "Devlin et al. 2019, arXiv:1810.04805"

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        model.requires_grad_(True)
        return Effects()
