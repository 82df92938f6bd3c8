"""SmoothQuant: what is hard to round in the activations moves into the weights (Xiao et al. 2022, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.quantize.integers import RoundActivations
from niwaki.compression.quantize.post_training import CalibratedGrid, nearest
from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.weights import stack


@dataclass
class Largest:
    """The largest |x| of each channel."""

    sizes: Tensor

    def __add__(self, other: Largest) -> Largest:
        return Largest(torch.maximum(self.sizes, other.sizes))


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(CalibratedGrid):
    """W diag(s) and X diag(1/s), with s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) over all linears that read the same;
    then both are rounded to 8 bits, weights by output channel, activations by token.

    The factors 1/s are multiplied with the input of each linear.
    """

    paper: ClassVar[str] = "Xiao et al. 2022, arXiv:2211.10438"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"{self.field}.alpha={self.alpha}: needs a number in 0..1")

    @property
    def activation_bits(self) -> int:
        return 8

    def statistic(self, values: Tensor) -> Largest:
        return Largest(values.abs().amax(0))

    def quantize(self, linears: Mapping[str, nn.Linear], statistic: Largest, context: Context) -> None:
        weights = [linear.weight.detach().float() for linear in linears.values()]
        factor = 1 / smoothing(statistic.sizes, weights, self.alpha)
        for linear, weight in zip(linears.values(), weights, strict=True):
            stack(linear, nearest(weight, self.layout, factor))
            linear.register_forward_pre_hook(RoundActivations(8, factor=factor))


def smoothing(sizes: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """s, (in,), of the largest activations (in,) and of weights (out, in)."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return (sizes.clamp(min=1e-5) ** alpha / largest.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
