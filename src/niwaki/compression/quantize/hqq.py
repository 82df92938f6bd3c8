"""Half-quadratic quantization, without any data (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from niwaki.compression.quantize.integers import FixedGrid
from niwaki.compression.quantize.layout import Layout, values_of
from niwaki.compression.quantize.post_training import PostTraining, with_codes
from niwaki.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HQQ(PostTraining):
    """argmin over z of ||W - s (codes(W; z) - z)||_p^p with p < 1, which forgives the few large errors: with e what is
    shrunk of the errors, and z the mean of codes - (W - e) / s, in turns.

    `group`: neighbouring inputs of a channel with a scale and a zero; null for the whole channel. `norm`: p. `beta`,
    which grows by `kappa` each time: how little is shrunk. `steps`: at most so many turns; it stops when the mean error
    does not fall, with the zeros of the least one. A grid begins with zero in its range, as all here. A weight that is
    zero stays so: where a group has one, the zero of its grid is rounded.
    """

    paper: ClassVar[str] = "Badri & Shaji 2023"

    bits: int = 4
    group: int | None = 32
    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm <= 1:
            raise ConfigError(f"{self.field}.norm={self.norm}: needs a number above 0, up to 1")
        if self.beta <= 0:
            raise ConfigError(f"{self.field}.beta={self.beta}: needs a number above 0")
        if self.kappa < 1:
            raise ConfigError(f"{self.field}.kappa={self.kappa}: needs a number of at least 1")
        if self.steps < 1:
            raise ConfigError(f"{self.field}.steps={self.steps}: needs a whole number of at least 1")

    @property
    def layout(self) -> Layout:
        return Layout(bits=self.bits, group=self.group, zero="real")

    def fixed(self, weight: Tensor) -> FixedGrid:
        grouped = self.layout.grouped(weight).float()
        scale, zero = self.layout.grid_of(grouped)
        assert zero is not None
        zero = self.best_zero(grouped, scale, zero)
        whole = zero.round().clamp(self.layout.lowest, self.layout.highest)
        zero = torch.where((grouped == 0).any(-1, keepdim=True), whole, zero)
        return with_codes(weight.shape, self.layout, grouped, scale, zero)

    def best_zero(self, grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The zeros (out, groups, 1) that the search ends with."""
        beta, least, best = self.beta, torch.inf, zero
        for _ in range(self.steps):
            codes = self.layout.codes_of(grouped, scale, zero)
            errors = grouped - values_of(codes, scale, zero)
            mean = float(errors.abs().mean())
            if mean >= least:
                break
            least, best = mean, zero
            zero = (codes - (grouped - shrunk(errors, beta, self.norm)) / scale).mean(-1, keepdim=True)
            beta *= self.kappa
        return best


def shrunk(values: Tensor, beta: float, norm: float) -> Tensor:
    """The proximal step of the l_p norm: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    sizes = values.abs()
    return values.sign() * (sizes - sizes.pow(norm - 1) / beta).clamp(min=0)
