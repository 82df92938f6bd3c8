"""How the integers of a weight are laid out: bits, groups, and whether zero lies in the middle of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError

Zero = Literal["none", "whole", "real"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """w = (code - zero) * scale, with a scale, and a zero, for each output channel or for `group` inputs of one.

    Without a zero the codes are -q..q with q = 2^(bits-1) - 1; of one bit, -1 and 1. Else they are
    -2^(bits-1)..2^(bits-1) - 1, and a whole zero is one of them, so that a weight that is zero stays so.
    """

    bits: int
    group: int | None = None
    zero: Zero = "none"

    @property
    def symmetric(self) -> bool:
        """Whether 0 lies in the middle of the codes."""
        return self.zero == "none"

    @property
    def offset(self) -> int:
        """What makes a code a number from 0 up."""
        return -self.lowest

    @property
    def lowest(self) -> int:
        """The least code."""
        return -self.highest if self.symmetric else -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The greatest code."""
        return max(2 ** (self.bits - 1) - 1, 1)

    @property
    def steps(self) -> int:
        """From the least code to the greatest."""
        return self.highest - self.lowest

    def grouped(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, groups, inputs of a group)."""
        return weight.reshape(len(weight), -1, self.group or weight.shape[1])

    def grid_of(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale, and the zero, that just hold all values of (..., inputs of a group): each (..., 1)."""
        values = weight.float()
        if self.symmetric:
            scale = values.abs().amax(-1, keepdim=True) / self.highest
            return torch.where(scale > 0, scale, 1.0), None
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / self.steps
        scale = torch.where(scale > 0, scale, 1.0)
        zero = self.lowest - low / scale
        return scale, zero if self.zero == "real" else zero.round_()

    def codes_of(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The codes nearest to some values, as floats."""
        if self.bits == 1:
            return torch.where(values < 0, -1.0, 1.0)
        codes = (values.float() / scale).round_() if zero is None else (values.float() / scale + zero).round_()
        return codes.clamp_(self.lowest, self.highest)

    def check(self, targets: Mapping[str, nn.Linear], field: str) -> None:
        """Raise ConfigError where the groups do not divide the inputs of a linear."""
        for name, linear in targets.items():
            if self.group and linear.in_features % self.group:
                raise ConfigError(
                    f"{field}.group={self.group}: {name} has {linear.in_features} inputs, which it does not divide"
                )


def values_of(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What codes stand for, fp32."""
    return codes.float() * scale if zero is None else (codes.float() - zero) * scale


def check_bits(bits: int, group: int | None, field: str, least: int = 2) -> None:
    """Raise ConfigError for bits or a group that cannot be."""
    if not least <= bits <= 8:
        raise ConfigError(f"{field}.bits={bits}: needs a whole number from {least} to 8")
    if group is not None and group < 2:
        raise ConfigError(f"{field}.group={group}: needs null or a whole number of at least 2")
