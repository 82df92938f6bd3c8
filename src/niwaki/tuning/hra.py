"""HRA: the inputs of a linear go through a chain of learned reflections (Yuan et al. 2024, arXiv:2405.17484)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class HRA(PeftTuning):
    """W H_1 ... H_rank, H_i = I - 2 u_i u_i^T / ||u_i||^2; at the start u_1 = u_2, u_3 = u_4 ..., so H is I."""

    paper: ClassVar[str] = "Yuan et al. 2024, arXiv:2405.17484"
    additive: ClassVar[bool] = False

    rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 2 or self.rank % 2:
            raise ConfigError(
                f"tuning.rank={self.rank}: needs an even number of at least 2, since reflections start in pairs"
            )

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import HRAConfig

        return HRAConfig(r=self.rank, target_modules=names)

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        directions: Tensor = layer.hra_u[ADAPTER]  # (in, rank)
        for unit in (directions / directions.norm(dim=0)).unbind(1):
            weight = weight - 2 * (weight @ unit)[:, None] * unit
        return weight
