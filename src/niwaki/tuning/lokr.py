"""LoKr: the Kronecker product of a small matrix and a low-rank one (LyCORIS, Yeh et al. 2023, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning, check_positive

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class LoKr(PeftTuning):
    """W + (alpha / rank) C kron (A B), C zero at the start.

    `factor`: the size of C along both axes; null for the divisor nearest to the square root of each. A B is one full
    matrix where `rank` is no less than half of its size. `decompose_both`: C is a product of low rank too, where `rank`
    is less than half of its size.
    """

    paper: ClassVar[str] = "Yeh et al. 2023, arXiv:2309.14859"

    rank: int = 8
    alpha: float = 8.0
    factor: int | None = None
    decompose_both: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(rank=self.rank, alpha=self.alpha)
        if self.factor is not None and self.factor < 1:
            raise ConfigError(f"tuning.factor={self.factor}: needs null or a whole number of at least 1")

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]
            decompose_factor=self.factor or -1,
            decompose_both=self.decompose_both,
            target_modules=names,
        )

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        # PEFT's own asks the base layer for its weight, which would ask this again.
        delta: Tensor = layer.scaling[ADAPTER] * torch.kron(whole(layer, "lokr_w1"), whole(layer, "lokr_w2"))
        return weight + delta


def whole(layer: Any, name: str) -> Tensor:
    """One side of the Kronecker product, which PEFT keeps as one matrix or as two."""
    one: Mapping[str, Tensor] = getattr(layer, name)
    if ADAPTER in one:
        return one[ADAPTER]
    first, second = getattr(layer, f"{name}_a"), getattr(layer, f"{name}_b")
    product: Tensor = first[ADAPTER] @ second[ADAPTER]
    return product
