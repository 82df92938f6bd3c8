"""Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877): the fit runs through the integer grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.compression.quantize.integers import put_on_grid, to_integers
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage


@dataclass(frozen=True, kw_only=True)
class QAT(Stage):
    """Forward: round(w / s) s, with s = max|w| / q drawn anew at each step; backward: straight through.

    `bits`: 2 to 8. `group`: inputs that share a scale; null for one scale per output channel.
    `activation_bits`: inputs of the linears rounded per token to so many bits; null leaves them alone.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    paper: ClassVar[str] = "Jacob et al. 2018, arXiv:1712.05877"

    bits: int = 8
    group: int | None = None
    activation_bits: int | None = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"compression.qat.bits={self.bits}: needs a whole number from 2 to 8")
        if self.group is not None and self.group < 2:
            raise ConfigError(f"compression.qat.group={self.group}: needs null or a whole number of at least 2")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ConfigError(
                f"compression.qat.activation_bits={self.activation_bits}: needs null or a whole number from 2 to 8"
            )

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        for name, linear in targets.items():
            if self.group and linear.in_features % self.group:
                raise ConfigError(
                    f"compression.qat.group={self.group}: {name} has {linear.in_features} inputs, "
                    "which it does not divide"
                )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        put_on_grid(context.targets, self.bits, self.group, self.activation_bits)
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        return to_integers(model, context, self.bits, self.group, self.activation_bits)
