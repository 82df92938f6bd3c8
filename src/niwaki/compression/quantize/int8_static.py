"""Post-training 8-bit quantization with one scale for all activations of a linear, found beforehand (Jacob et al. 2018,
arXiv:1712.05877; Wu et al. 2020, arXiv:2004.09602)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from niwaki.compression.quantize.integers import RoundActivations, input_codes
from niwaki.compression.quantize.post_training import CalibratedGrid, nearest
from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.weights import stack

Range = Literal["min_max", "percentile", "mse"]
MANY = 8  # times as many values as are drawn: hardly one is drawn twice, and to order them all takes long
KEPT = 2**18  # values of a linear's inputs that a range is found from


@dataclass
class Sample:
    """The largest |x|, and up to `KEPT` of all `count` of them, drawn at random: every so many would be those of a few
    channels."""

    largest: Tensor
    values: Tensor
    count: int

    def __add__(self, other: Sample) -> Sample:
        count = self.count + other.count
        values = torch.cat([one.thinned(round(KEPT * one.count / count)) for one in (self, other)])
        return Sample(torch.maximum(self.largest, other.largest), values, count)

    def thinned(self, size: int) -> Tensor:
        """At most `size` of the values, the same ones each time; of very many each is drawn by itself."""
        held = len(self.values)
        if held <= size:
            return self.values
        source = torch.Generator().manual_seed(self.count)
        if held > MANY * size:
            drawn = torch.randint(held, (size,), generator=source)
        else:
            drawn = torch.randperm(held, generator=source)[:size]
        return self.values[drawn.to(self.values.device)]


@dataclass(frozen=True, kw_only=True)
class Int8Static(CalibratedGrid):
    """codes = clip(round(x / s), -127, 127) with one s for all activations: max|x| / 127 (min_max), the `percentile` of
    |x| in its place, or the range with the least mean squared error (mse). Weights as in quantize/int8."""

    paper: ClassVar[str] = "Jacob et al. 2018, arXiv:1712.05877; Wu et al. 2020, arXiv:2004.09602"

    range: Range = "min_max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range not in get_args(Range):
            raise ConfigError(f"{self.field}.range={self.range!r}: needs one of {', '.join(get_args(Range))}")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"{self.field}.percentile={self.percentile}: needs a number above 50, up to 100")

    @property
    def activation_bits(self) -> int:
        return 8

    def statistic(self, values: Tensor) -> Sample:
        sizes = values.abs().flatten()
        if self.range == "min_max":
            return Sample(sizes.max(), sizes[:0], len(sizes))
        whole = Sample(sizes.max(), sizes, len(sizes))
        return Sample(whole.largest, whole.thinned(KEPT), whole.count)

    def quantize(self, linears: Mapping[str, nn.Linear], statistic: Sample, context: Context) -> None:
        scale = self.bound(statistic) / 127
        for linear in linears.values():
            stack(linear, nearest(linear.weight.detach(), self.layout, input_scale=scale))
            linear.register_forward_pre_hook(RoundActivations(8, scale))

    def bound(self, sample: Sample) -> Tensor:
        """The |x| that gets the last code, ()."""
        if self.range == "min_max":
            found = sample.largest
        elif self.range == "percentile":
            rank = max(1, min(len(sample.values), round(self.percentile / 100 * len(sample.values))))
            found = sample.values.kthvalue(rank).values
        else:
            found = least_error(sample)
        return found.clamp(min=1e-8)


def least_error(sample: Sample, steps: int = 100) -> Tensor:
    """Of `steps` bounds up to the largest |x|, the one with the least mean squared error of the sample."""
    bounds = sample.largest * torch.arange(1, steps + 1, device=sample.largest.device) / steps
    errors = torch.stack(
        [(input_codes(sample.values, bound / 127, 8) * bound / 127 - sample.values).square().mean() for bound in bounds]
    )
    return bounds[errors.argmin()]
