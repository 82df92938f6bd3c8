"""Integer grids: as a link while training or after it, as stored integers in the end.

Jacob et al. 2018 (arXiv:1712.05877), with the straight-through gradient of Bengio et al. 2013 (arXiv:1308.3432).
One scale per output channel, or per group of inputs of one channel, as `Layout` says. Activations are rounded per
token, with a scale drawn from the token itself, or all with one scale that was found before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki import packing
from niwaki.compression.quantize.kernels import Product, integer_product
from niwaki.compression.quantize.layout import Layout, Zero, values_of
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


class FixedGrid(Link):
    """The values of codes that were chosen once, whatever enters: (code - zero) * scale * factor. (out, in).

    `codes` (out, in), `scale` and `zero` (out, groups), `factor` (in,): what the input is multiplied by before the
    product with the integers; `input_scale` (): of inputs that all have one.
    """

    phase = Phase.QUANTIZE
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    factor: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self, layout: Layout, codes: Tensor, scale: Tensor, zero: Tensor | None = None, *,
        factor: Tensor | None = None, input_scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layout = layout
        given = {"codes": codes.to(torch.int8), "scale": scale, "zero": zero, "factor": factor}
        for name, tensor in (given | {"input_scale": input_scale}).items():
            self.register_buffer(name, tensor)

    def forward(self, weight: Tensor) -> Tensor:
        zero = None if self.zero is None else self.zero[..., None]
        values = values_of(self.layout.grouped(self.codes), self.scale[..., None], zero).view(weight.shape)
        return (values if self.factor is None else values * self.factor).to(weight.dtype)

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.named_buffers() if tensor is not None}


class RoundActivations:
    """Forward pre-hook of a linear: rounds its input as the integers will, per token or all with one `scale`, after the
    multiplication with a `factor`, which it undoes."""

    def __init__(self, bits: int, scale: Tensor | None = None, factor: Tensor | None = None) -> None:
        self.bits = bits
        self.scale = scale
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = inputs[0] if self.factor is None else inputs[0] * self.factor
        if self.scale is None:
            rounded = StraightThrough.apply(values, self.bits)
        else:
            rounded = (input_codes(values, self.scale, self.bits) * self.scale).to(values.dtype)
        return (rounded if self.factor is None else rounded / self.factor, *inputs[1:])


def input_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of activations that all have one scale; what lies beyond the last code gets that. Floats."""
    last = largest_code(bits)
    return (values.float() / scale).round_().clamp_(-last, last)


def put_on_grid(targets: Mapping[str, nn.Linear], bits: int, group: int | None, activation_bits: int | None) -> None:
    """Stack a grid on every target, and round their inputs."""
    for linear in targets.values():
        stack(linear, IntegerGrid(bits, group))
        if activation_bits:
            linear.register_forward_pre_hook(RoundActivations(activation_bits))


def to_integers(
    model: nn.Module, context: Context, layout: Layout, activation_bits: int | None, *,
    names: Collection[str] | None = None,
) -> list[Edit]:  # fmt: skip
    """Replace the folded targets that have been on a grid, all or those of these names, by IntegerLinears with the
    codes that it recorded."""
    asked = context.targets if names is None else names
    records = {name: context.records[name] for name in asked if "codes" in context.records.get(name, {})}
    edit = UseIntegers(
        modules=list(records), bits=layout.bits, group=layout.group, activation_bits=activation_bits, zero=layout.zero,
        factored=[name for name, record in records.items() if "factor" in record],
        one_scale=[name for name, record in records.items() if "input_scale" in record],
        own_codes=[name for name, record in records.items() if needs_codes(model.get_submodule(name), record, layout)],
    )  # fmt: skip
    edit.apply(model)
    for name, record in records.items():
        integer: Any = model.get_submodule(name)
        integer.store(**record)
    return [edit]


def needs_codes(linear: nn.Module, record: Mapping[str, Tensor], layout: Layout) -> bool:
    """Whether the codes of a linear that is packed already (shared values) have to be stored: they are not those
    nearest to its values, as of a method with a rule of its own, or they take no more bytes than it does."""
    if not isinstance(linear, Packed):
        return False
    codes, scale, zero = record["codes"], record["scale"][..., None], record.get("zero")
    zero = None if zero is None else zero[..., None]
    made = layout.codes_of(layout.grouped(linear.dequantized()), scale, zero).view(codes.shape)
    held = sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
    return -(-codes.numel() * layout.bits // 8) <= held or not torch.equal(made.to(torch.int8), codes)


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """int8 codes to a stream of `bits` each, offset to be unsigned. uint8, ceil(n * bits / 8) long."""
    unsigned = codes.to(torch.int16) + layout.offset
    return packing.pack(unsigned // 2 if layout.bits == 1 else unsigned, layout.bits)


def unpack(packed: Tensor, layout: Layout, shape: tuple[int, int]) -> Tensor:
    """The int8 codes that `pack` was given, (out, in)."""
    unsigned = packing.unpack(packed, layout.bits, shape[0] * shape[1]).to(torch.int16)
    return ((unsigned * 2 if layout.bits == 1 else unsigned) - layout.offset).to(torch.int8).view(shape)


@dataclass(frozen=True, kw_only=True)
class UseIntegers(Edit):
    """Linears become IntegerLinears of one layout. One that is stored in another way already (shared values) stays
    stored so, and its codes are made when they are needed, unless it is among `own_codes`."""

    carried: ClassVar[bool] = False  # another training starts from dense weights

    modules: list[str]
    bits: int
    group: int | None
    activation_bits: int | None
    zero: Zero = "none"
    factored: list[str] = field(default_factory=list)  # those whose input is multiplied by a factor for each channel
    one_scale: list[str] = field(default_factory=list)  # those whose activations all have one scale
    own_codes: list[str] = field(default_factory=list)  # those that hold their codes, however they were stored before

    def apply(self, model: nn.Module) -> None:
        for name in self.modules:
            linear: Any = model.get_submodule(name)
            keeps = isinstance(linear, Packed) and name not in self.own_codes
            integer = IntegerLinear(
                linear.in_features, linear.out_features, bits=self.bits, group=self.group, zero=self.zero,
                activation_bits=self.activation_bits, bias=linear.bias, factored=name in self.factored,
                one_scale=name in self.one_scale, shared=linear if keeps else None,
            )  # fmt: skip
            integer.dense = getattr(linear, "dense", type(linear))
            replace_module(model, name, integer)


class IntegerLinear(Packed):
    """y = ((codes - zero) * scale) (factor * x) + bias, with the codes stored as integers of `bits` each.

    `codes`: int8 (out, in) for 8 bits, else a uint8 stream with nothing between the codes. `scale`: (out, groups), and
    as `zero`, where there is one: int8, or real numbers. `factor`: (in,), or None. `input_scale`: (), or None where
    activations are rounded token by token.
    Where a kernel is there for the codes (`kernels.py`) their products are summed, exactly; otherwise the product is
    one of the dequantized weight. `shared`, in place of `codes`, holds the values that codes are rounded from.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    factor: Tensor | None
    input_scale: Tensor | None
    holds: ClassVar[str] = "integer codes"
    weight = None  # T5 asks for the type of a linear's weight, where it has one
    _product: Product | None = None  # which takes the operand

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group: int | None,
        activation_bits: int | None, bias: nn.Parameter | None, shared: Any = None, zero: Zero = "none",
        factored: bool = False, one_scale: bool = False,
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
        groups = (out_features, in_features // group if group else 1)
        self.register_buffer("scale", torch.ones(groups))
        zeros = {"none": None, "whole": torch.zeros(groups, dtype=torch.int8), "real": torch.zeros(groups)}
        self.register_buffer("zero", zeros[zero])
        self.register_buffer("factor", torch.ones(in_features) if factored else None)
        self.register_buffer("input_scale", torch.ones(()) if one_scale else None)

    @property
    def integer_product(self) -> Product | None:
        """What sums products of the codes; None: the weight is dequantized."""
        return integer_product(self.scale.device, self.layout, self.activation_bits, self.in_features)

    @property
    def kernel(self) -> str:
        """What multiplies the weight."""
        product = self.integer_product
        return super().kernel if product is None else product.name

    @property
    def layout(self) -> Layout:
        """How the codes are laid out."""
        kind: Zero = "none" if self.zero is None else "real" if self.zero.is_floating_point() else "whole"
        return Layout(bits=self.bits, group=self.group, zero=kind)

    @property
    def zeros_without_code(self) -> int:
        """Those that the shared values leave out; else every weight has its code."""
        return 0 if self.shared is None else int(self.shared.zeros_without_code)

    def store(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None = None, factor: Tensor | None = None,
        input_scale: Tensor | None = None, **others: Tensor,
    ) -> None:  # fmt: skip
        """Take codes (out, in) int8 and what belongs to them. `others` is what other links recorded."""
        device = self.scale.device
        self.scale = scale.to(device)
        for name, given in (("zero", zero), ("factor", factor), ("input_scale", input_scale)):
            present = getattr(self, name)
            assert (given is None) == (present is None), name
            if given is not None:
                # Linears that read the same may share what they were given, which a file would hold but once.
                setattr(self, name, given.to(device, present.dtype, copy=True))
        self._operand = None
        if self.shared is None:
            self.codes = (codes if self.bits == 8 else pack(codes.cpu(), self.layout)).to(device)
        assert torch.equal(self.integers(), codes.to(device)), "the codes are not those of the shared values"

    def integers(self) -> Tensor:
        """The codes, (out, in) int8."""
        if self.shared is not None:
            scale, zero = self._grid()
            grouped = self.layout.grouped(self.shared.dequantized())
            return self.layout.codes_of(grouped, scale, zero).to(torch.int8).view(self.out_features, -1)
        if self.bits == 8:
            return self.codes
        return unpack(self.codes, self.layout, (self.out_features, self.in_features)).to(self.codes.device)

    def dequantized(self) -> Tensor:
        """(codes - zero) * scale * factor, (out, in), bit for bit the folded weight."""
        return self._values() if self.factor is None else self._values() * self.factor

    def _values(self) -> Tensor:
        """What the codes stand for: the weight of the input times its factor."""
        values = values_of(self.layout.grouped(self.integers()), *self._grid())
        return values.view(self.out_features, self.in_features)

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, each (out, groups, 1)."""
        return self.scale[..., None], None if self.zero is None else self.zero.float()[..., None]

    def forward(self, values: Tensor) -> Tensor:
        if self._operand is None:
            with torch.inference_mode(False), torch.no_grad():  # it may be used under a gradient later
                self._product = self.integer_product
                if self._product:
                    self._operand = self._product.operand(self.integers())
                else:
                    dense = self._values() if self.activation_bits else self.dequantized()
                    self._operand = dense.to(self.scale.dtype)
        if not self.activation_bits:
            return functional.linear(values, self._operand, self.bias)
        codes, scale = self._input_codes(values.reshape(-1, self.in_features))
        if self._product:
            sums = self._product(codes, self._operand, self.out_features)
            product = sums.float().mul_(scale).mul_(self.scale[:, 0])
            product = product if self.bias is None else product.add_(self.bias)
        else:
            product = functional.linear((codes * scale).to(values.dtype), self._operand, self.bias)
        return product.view(*values.shape[:-1], self.out_features).to(values.dtype)

    def _input_codes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of (tokens, in) as floats, and their scale: of each token (tokens, 1), or one for all."""
        assert self.activation_bits
        values = values if self.factor is None else values * self.factor
        if self.input_scale is None:
            return to_codes(values, self.activation_bits)
        return input_codes(values, self.input_scale, self.activation_bits), self.input_scale

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group={self.group}"
