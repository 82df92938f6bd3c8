"""DoRA: the rows of a weight learn their length and, by LoRA, their direction (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from niwaki.stage import Context
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning, check_positive

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class DoRA(PeftTuning):
    """m V / ||V||, V = W + (alpha / rank) B A, with a norm per output and m the norms of W at the start.

    No gradient goes through ||V|| (section 4.3 of the paper). `rank_stabilized` divides alpha by sqrt(rank) instead.
    """

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2402.09353"
    additive: ClassVar[bool] = False

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(rank=self.rank, alpha=self.alpha)

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            use_dora=True,
            target_modules=names,
        )

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        direction = super().merged(layer, weight)
        norm = direction.detach().norm(dim=1, keepdim=True)
        magnitude: Tensor = layer.lora_magnitude_vector[ADAPTER].weight
        return magnitude[:, None] / norm * direction
