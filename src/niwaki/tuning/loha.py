"""LoHa: the product, entry by entry, of two low-rank matrices (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098;
LyCORIS, Yeh et al. 2023, arXiv:2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from niwaki.stage import Context
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning, check_positive

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class LoHa(PeftTuning):
    """W + (alpha / rank) (A1 B1) * (A2 B2), of rank up to rank^2; B2 is zero at the start."""

    paper: ClassVar[str] = "Hyeon-Woo et al. 2021, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859"

    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(rank=self.rank, alpha=self.alpha)

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import LoHaConfig

        return LoHaConfig(r=self.rank, alpha=self.alpha, target_modules=names)  # type: ignore[arg-type]

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        # PEFT's own asks the base layer for its weight, which would ask this again.
        a1, b1, a2, b2 = (
            getattr(layer, f"hada_{name}")[ADAPTER] for name in ("w1_a", "w1_b", "w2_a", "w2_b")
        )  # fmt: skip
        delta: Tensor = layer.scaling[ADAPTER] * (a1 @ b1) * (a2 @ b2)
        return weight + delta
