"""OFT: the inputs of a linear are rotated, block by block (Qiu et al. 2023, arXiv:2306.07280)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class OFT(PeftTuning):
    """W R^T, R block-diagonal with blocks (I + Q)(I - Q)^-1, Q skew-symmetric and zero at the start.

    `block`: inputs that are rotated together. `share_blocks`: one rotation for all blocks of a linear.
    `terms`: of the Neumann series in place of the inverse, PEFT's usual, faster and orthogonal but for what the series
    leaves out, which is little for a small Q; null for the inverse itself, as in the paper, which PEFT takes of -Q.
    """

    paper: ClassVar[str] = "Qiu et al. 2023, arXiv:2306.07280"
    additive: ClassVar[bool] = False

    block: int = 32
    share_blocks: bool = False
    terms: int | None = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise ConfigError(f"tuning.block={self.block}: needs a whole number of at least 2")
        if self.terms is not None and self.terms < 2:
            raise ConfigError(f"tuning.terms={self.terms}: needs null or a whole number of at least 2")

    def check_linear(self, name: str, linear: nn.Linear) -> None:
        if linear.in_features % self.block:
            raise ConfigError(
                f"tuning.block={self.block}: {name} has {linear.in_features} inputs; needs a divisor of it"
            )

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import OFTConfig

        return OFTConfig(
            oft_block_size=self.block,
            block_share=self.share_blocks,
            use_cayley_neumann=self.terms is not None,
            num_cayley_neumann_terms=self.terms or 5,
            target_modules=names,
        )

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        rotation: Tensor = layer.get_delta_weight(ADAPTER)  # (in, in)
        return weight @ rotation.T
