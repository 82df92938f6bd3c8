"""Weights of one size and a sign, with or without zeros between: what the ternary and the binary method share."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.quantize.integers import RoundActivations, to_integers
from niwaki.compression.quantize.layout import Layout, check_bits
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage
from niwaki.weights import Link, stack


class PassThrough(torch.autograd.Function):
    """(weight, what stands in its place) -> the latter; the gradient goes to the weight unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class SignGrid(Link):
    """w -> code * size, with codes that are signs, or 0, and a size for each channel or group. (out, in)."""

    phase = Phase.QUANTIZE

    def __init__(self, method: Signs) -> None:
        super().__init__()
        self.method = method

    def forward(self, weight: Tensor) -> Tensor:
        codes, size = self._found(weight)
        found: Tensor = PassThrough.apply(weight, (codes * size).reshape(weight.shape))
        return found

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        codes, size = self._found(weight)
        return {"codes": codes.to(torch.int8).reshape(weight.shape), "scale": size[..., 0]}

    @torch.no_grad()
    def _found(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.method.signs(self.method.layout.grouped(weight).float())


@dataclass(frozen=True, kw_only=True)
class Signs(Stage):
    """`group`: inputs that share a size; null for one size per output channel. `activation_bits`: inputs of the linears
    rounded token by token to so many bits; null leaves them alone. The gradient passes straight through. A few steps
    from a pretrained model lose much: learn from a teacher beside it (distill/logits, distill/hidden)."""

    phase: ClassVar[Phase] = Phase.QUANTIZE
    bits: ClassVar[int]

    group: int | None = None
    activation_bits: int | None = 8

    def __post_init__(self) -> None:
        check_bits(2, self.group, self.field)
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ConfigError(
                f"{self.field}.activation_bits={self.activation_bits}: needs null or a whole number from 2 to 8"
            )

    @property
    def layout(self) -> Layout:
        """Of the codes."""
        return Layout(bits=self.bits, group=self.group)

    @abc.abstractmethod
    def signs(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (out, groups, inputs of a group) and sizes (out, groups, 1) of a weight."""

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        self.layout.check(targets, self.field)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        for linear in context.targets.values():
            stack(linear, SignGrid(self))
            if self.activation_bits:
                linear.register_forward_pre_hook(RoundActivations(self.activation_bits))
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        return to_integers(model, context, self.layout, self.activation_bits)
