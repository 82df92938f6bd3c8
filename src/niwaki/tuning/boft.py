"""BOFT: the inputs of a linear are rotated by a product of butterfly factors (Liu et al. 2023, arXiv:2311.06243)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects
from niwaki.tuning.peft_tuning import ADAPTER, PeftTuning

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class BOFT(PeftTuning):
    """diag(s) W R^T, R = B_m ... B_1, each B_i = P_i D_i P_i^T with D_i block-diagonal and orthogonal (Cayley) and P_i
    the i-th butterfly permutation; R is I and s is 1 at the start.

    `block`: inputs that one block rotates. `factors`: m; with 1 it is OFT with a learned scale per output, and each
    further one doubles the inputs that an output of R sees. The merged weight is always what the model runs with:
    PEFT's own forward would compile a CUDA kernel, and silently take one factor where it cannot.
    """

    paper: ClassVar[str] = "Liu et al. 2023, arXiv:2311.06243"
    additive: ClassVar[bool] = False

    block: int = 4
    factors: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2:
            raise ConfigError(f"tuning.block={self.block}: needs a whole number of at least 2")
        if self.factors < 1:
            raise ConfigError(f"tuning.factors={self.factors}: needs a whole number of at least 1")
        if self.factors > 1 and self.block % 2:
            raise ConfigError(f"tuning.block={self.block}: needs an even number with tuning.factors={self.factors}")
        if not self.merge:
            raise ConfigError("tuning.merge=false: needs true, since boft always runs with the merged weight")

    def check_linear(self, name: str, linear: nn.Linear) -> None:
        reach = self.block * 2 ** (self.factors - 1)
        if linear.in_features % reach:
            raise ConfigError(
                f"tuning.block={self.block}, factors={self.factors}: {name} has {linear.in_features} inputs; "
                f"block * 2^(factors - 1) = {reach} must divide that"
            )

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import BOFTConfig

        return BOFTConfig(
            boft_block_size=self.block,
            boft_n_butterfly_factor=self.factors,
            target_modules=names,
        )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        with without_kernel():
            self.inject(model, context)
        self.link(model, context)
        return Effects()

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        blocks: Tensor = layer.boft_R[ADAPTER]  # (factors, blocks, block, block)
        orthogonal = layer.cayley_batch(blocks.flatten(0, 1)).view_as(blocks)
        for factor, permutation in zip(orthogonal, layer.boft_P, strict=True):
            order = permutation.argmax(1)
            whole = torch.block_diag(*factor)[order][:, order]  # P D P^T
            weight = weight @ whole.T
        scale: Tensor = layer.boft_s[ADAPTER]  # (out, 1)
        return scale * weight


@contextmanager
def without_kernel() -> Iterator[None]:
    """Let PEFT make its layers as if its CUDA kernel were there; only its own forward would call it."""
    from peft.tuners.boft import layer as found

    layer: Any = found
    before = layer._FBD_CUDA
    layer._FBD_CUDA = object()
    try:
        yield
    finally:
        layer._FBD_CUDA = before
