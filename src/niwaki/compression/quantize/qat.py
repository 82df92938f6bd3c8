"""Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877): the fit runs through the integer grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.compression.quantize.integers import put_on_grid, to_integers
from niwaki.compression.quantize.layout import Layout, check_bits
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
        check_bits(self.bits, self.group, "compression.qat")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ConfigError(
                f"compression.qat.activation_bits={self.activation_bits}: needs null or a whole number from 2 to 8"
            )

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        self.layout.check(targets, "compression.qat")

    @property
    def layout(self) -> Layout:
        """Of the weights."""
        return Layout(bits=self.bits, group=self.group)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        put_on_grid(context.targets, self.bits, self.group, self.activation_bits)
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        return to_integers(model, context, self.layout, self.activation_bits)
