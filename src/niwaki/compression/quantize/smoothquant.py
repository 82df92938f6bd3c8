"""SmoothQuant: what is hard to round in the activations moves into the weights (Xiao et al. 2022, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.quantize.factors import Factored
from niwaki.compression.quantize.integers import RoundActivations
from niwaki.compression.quantize.post_training import nearest
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
class SmoothQuant(Factored):
    """W diag(s) and X diag(1/s), with s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) over all linears that read the same;
    then both are rounded to 8 bits, weights by output channel, activations by token.

    The factors 1/s go into what comes before the linears, or are multiplied with the input of each.
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

    def factor(self, linears: Mapping[str, nn.Linear], statistic: Largest) -> Tensor:
        largest = torch.stack([linear.weight.detach().float().abs().amax(0) for linear in linears.values()]).amax(0)
        return 1 / smoothing(statistic.sizes, largest, self.alpha)

    def put(
        self, linears: Mapping[str, nn.Linear], statistic: Largest, factor: Tensor, context: Context, *,
        at_run_time: bool,
    ) -> None:  # fmt: skip
        own = factor if at_run_time else None
        for linear in linears.values():
            weight = linear.weight.detach().float()
            stack(linear, nearest(weight, self.layout, factor, at_run_time=at_run_time))
            linear.register_forward_pre_hook(RoundActivations(8, factor=own))


def smoothing(sizes: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s, (in,), of the largest activations (in,) and the largest weights (in,)."""
    return (sizes.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
