"""Symmetric integer grids: as a link while training, as stored integers afterwards.

Jacob et al. 2018 (arXiv:1712.05877), with the straight-through gradient of Bengio et al. 2013 (arXiv:1308.3432).
One scale per output channel, or per group of inputs of one channel; the grid is -q..q with q = 2^(bits-1) - 1, so
zero is on it and zeros stay zeros. Activations are rounded per token, with a scale drawn from the token itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki import packing
from niwaki.edits import Edit
from niwaki.stage import Context, Phase
from niwaki.weights import Link, Packed, replace_module, stack


def largest_code(bits: int) -> int:
    """q of the grid -q..q."""
    return 2 ** (bits - 1) - 1


def to_codes(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes on -q..q (floats, same shape) and scales (..., 1), one scale per last axis: absmax / q."""
    scale = values.abs().amax(-1, keepdim=True).float() / largest_code(bits)
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).round_(), scale


class StraightThrough(torch.autograd.Function):
    """x -> codes * scale; the gradient passes unchanged, since absmax scales clip nothing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bits: int) -> Tensor:
        codes, scale = to_codes(values, bits)
        return codes.mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class IntegerGrid(Link):
    """w -> the nearest point of its grid. (out, in)."""

    phase = Phase.QUANTIZE

    def __init__(self, bits: int, group: int | None) -> None:
        super().__init__()
        self.bits = bits
        self.group = group

    def forward(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(-1, self.group) if self.group else weight
        return StraightThrough.apply(grouped, self.bits).reshape(weight.shape)

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        """`codes` (out, in) int8 and `scale` (out, groups): their product is exactly what `forward` gives."""
        grouped = weight.reshape(-1, self.group) if self.group else weight
        codes, scale = to_codes(grouped, self.bits)
        return {"codes": codes.to(torch.int8).reshape(weight.shape), "scale": scale.reshape(len(weight), -1)}


class RoundActivations:
    """Forward pre-hook of a linear: rounds its input per token while the model trains on the grid."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (StraightThrough.apply(inputs[0], self.bits), *inputs[1:])


def put_on_grid(targets: Mapping[str, nn.Linear], bits: int, group: int | None, activation_bits: int | None) -> None:
    """Stack a grid on every target, and round their inputs."""
    for linear in targets.values():
        stack(linear, IntegerGrid(bits, group))
        if activation_bits:
            linear.register_forward_pre_hook(RoundActivations(activation_bits))


def to_integers(
    model: nn.Module, context: Context, bits: int, group: int | None, activation_bits: int | None
) -> list[Edit]:
    """Replace every folded target by an IntegerLinear with the codes that its grid recorded."""
    edit = UseIntegers(modules=list(context.targets), bits=bits, group=group, activation_bits=activation_bits)
    edit.apply(model)
    for name in context.targets:
        integer: Any = model.get_submodule(name)
        integer.store(context.records[name]["codes"], context.records[name]["scale"])
    return [edit]


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes to a stream of `bits` each, offset by q to be unsigned. uint8, ceil(n * bits / 8) long."""
    return packing.pack(codes.to(torch.int16) + largest_code(bits), bits)


def unpack(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """The int8 codes that `pack` was given, (out, in)."""
    unsigned = packing.unpack(packed, bits, shape[0] * shape[1])
    return (unsigned.to(torch.int16) - largest_code(bits)).to(torch.int8).view(shape)


@dataclass(frozen=True, kw_only=True)
class UseIntegers(Edit):
    """Linears become IntegerLinears of one layout. One that is stored in another way already (shared values) stays
    stored so, and its codes are made when they are needed."""

    carried: ClassVar[bool] = False  # another training starts from dense weights

    modules: list[str]
    bits: int
    group: int | None
    activation_bits: int | None

    def apply(self, model: nn.Module) -> None:
        for name in self.modules:
            linear: Any = model.get_submodule(name)
            integer = IntegerLinear(
                linear.in_features, linear.out_features, bits=self.bits, group=self.group,
                activation_bits=self.activation_bits, bias=linear.bias,
                shared=linear if isinstance(linear, Packed) else None,
            )  # fmt: skip
            integer.dense = getattr(linear, "dense", type(linear))
            replace_module(model, name, integer)


class IntegerLinear(Packed):
    """y = (codes * scale) x + bias, with the codes stored as integers of `bits` each.

    `codes`: int8 (out, in) for 8 bits, else a uint8 stream with nothing between the codes. `scale`: (out, groups).
    With one scale per channel and rounded activations the product runs on integers (int32 accumulation); otherwise
    on the dequantized weight. `shared`, in place of `codes`, holds the values that the codes are rounded from.
    """

    codes: Tensor
    scale: Tensor
    holds: ClassVar[str] = "integer codes"
    weight = None  # T5 asks for the type of a linear's weight, where it has one

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group: int | None,
        activation_bits: int | None, bias: nn.Parameter | None, shared: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group = group
        self.activation_bits = activation_bits
        self.bias = bias
        shape = (out_features, in_features) if bits == 8 else (-(-out_features * in_features * bits // 8),)
        self.shared = shared
        if shared is None:
            self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8 if bits == 8 else torch.uint8))
        else:
            shared.bias = None  # or it would be stored twice
        self.register_buffer("scale", torch.ones(out_features, in_features // group if group else 1))

    @property
    def runs_on_integers(self) -> bool:
        """Whether the product is an integer one, rather than one of the dequantized weight."""
        return bool(self.activation_bits) and not self.group and self.scale.device.type == "cpu"

    @property
    def zeros_without_code(self) -> int:
        """Those that the shared values leave out; else every weight has its code."""
        return 0 if self.shared is None else int(self.shared.zeros_without_code)

    def store(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes (out, in) int8 and scales (out, groups)."""
        device = self.scale.device
        self.scale = scale.to(device)
        self._operand = None
        if self.shared is None:
            self.codes = (codes if self.bits == 8 else pack(codes.cpu(), self.bits)).to(device)
        assert torch.equal(self.integers(), codes.to(device)), "the codes are not those of the shared values"

    def integers(self) -> Tensor:
        """The codes, (out, in) int8."""
        if self.shared is not None:
            grouped = self.shared.dequantized().view(self.out_features, self.scale.shape[1], -1)
            return (grouped / self.scale[:, :, None]).round_().to(torch.int8).view(self.out_features, -1)
        if self.bits == 8:
            return self.codes
        return unpack(self.codes, self.bits, (self.out_features, self.in_features)).to(self.codes.device)

    def dequantized(self) -> Tensor:
        """codes * scale, (out, in), bit for bit the folded weight."""
        grouped = self.integers().view(self.out_features, self.scale.shape[1], -1).float()
        return grouped.mul_(self.scale[:, :, None]).view(self.out_features, self.in_features)

    def forward(self, values: Tensor) -> Tensor:
        if self._operand is None:
            with torch.inference_mode(False), torch.no_grad():  # it may be used under a gradient later
                dense = not self.runs_on_integers
                self._operand = self.dequantized().to(self.scale.dtype) if dense else self.integers().t().contiguous()
        if not self.activation_bits:
            return functional.linear(values, self._operand, self.bias)
        if not self.runs_on_integers:
            codes, scale = to_codes(values, self.activation_bits)
            return functional.linear((codes * scale).to(values.dtype), self._operand, self.bias)
        codes, scale = to_codes(values.reshape(-1, self.in_features), self.activation_bits)
        product = torch._int_mm(codes.to(torch.int8), self._operand).float().mul_(scale).mul_(self.scale[:, 0])
        if self.bias is not None:
            product += self.bias
        return product.view(*values.shape[:-1], self.out_features).to(values.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group={self.group}"
