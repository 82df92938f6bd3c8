"""Weights that are stored as floats of 8 or 16 bits: the link that rounds, what is saved, and the product with it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.targets import Targets, check_targets, chosen
from niwaki.edits import Edit
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage
from niwaki.weights import Link, Packed, replace_module, stack

TYPES = {name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "bfloat16")}
LEAST_CAPABILITY = (8, 9)  # of CUDA, for products of 8-bit floats
DIVISOR = 16  # of the sizes of such a product


def to_floats(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values as 8-bit floats, and their scales (..., 1), one per last axis: absmax / the largest finite value."""
    scale = values.abs().amax(-1, keepdim=True).float() / torch.finfo(dtype).max
    scale = torch.where(scale > 0, scale, 1.0)
    return nearest(values.float() / scale, dtype), scale


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as floats of a type, and -0.0 as 0.0, which no value on disk has to stand for."""
    return (values.to(dtype).float() + 0.0).to(dtype)


def scaled(dtype: torch.dtype) -> bool:
    """Whether values of this type have scales beside them."""
    return dtype.itemsize == 1


class FloatGrid(Link):
    """w -> the nearest float of this type, times the scale of its row where the type has 8 bits. (out, in)."""

    phase = Phase.QUANTIZE

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return values_of(**self.record(weight)).to(weight.dtype)

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        """`floats` (out, in) of the type, and `scale` (out, 1) where there is one."""
        if not scaled(self.dtype):
            return {"floats": nearest(weight.detach(), self.dtype)}
        floats, scale = to_floats(weight.detach(), self.dtype)
        return {"floats": floats, "scale": scale}


def values_of(floats: Tensor, scale: Tensor | None = None) -> Tensor:
    """What stored floats stand for, fp32."""
    return floats.float() if scale is None else floats.float() * scale


def round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook of a linear: its input as e4m3 floats with a scale for each token."""
    return (values_of(*to_floats(inputs[0], torch.float8_e4m3fn)).to(inputs[0].dtype), *inputs[1:])


@dataclass(frozen=True, kw_only=True)
class FloatStorage(Stage):
    """`targets`: a regular expression on the whole name of a linear, or a list of the parts that they play; null for
    all linears of the blocks."""

    phase: ClassVar[Phase] = Phase.QUANTIZE
    during_fit: ClassVar[bool] = False

    targets: Targets = None

    def __post_init__(self) -> None:
        check_targets(self.targets, self.field)

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """The name of the type, one of `TYPES`."""

    @property
    def rounds_inputs(self) -> bool:
        """Whether what enters the linears has 8 bits too."""
        return False

    def conflict(self, others: Sequence[Stage]) -> str | None:
        sharing = next((other.name for other in others if other.phase is Phase.SHARE), None)
        if sharing:
            return (
                f"{self.name} and {sharing}: each stores the weights in its own way, one as floats, one as indices of "
                "shared values; leave one out"
            )
        return super().conflict(others)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        chosen(self.targets, self.field, anatomy, targets)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        for linear in chosen(self.targets, self.field, context.anatomy, context.targets).values():
            stack(linear, FloatGrid(TYPES[self.dtype]))
            if self.rounds_inputs:
                linear.register_forward_pre_hook(round_input)
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        records = {name: context.records.get(name, {}) for name in context.targets}
        names = [name for name, record in records.items() if "floats" in record]
        edit = UseFloats(modules=names, dtype=self.dtype, activations=self.rounds_inputs)
        edit.apply(model)
        for name in names:
            stored: Any = model.get_submodule(name)
            stored.store(records[name]["floats"], records[name].get("scale"))
        return [edit]


@dataclass(frozen=True, kw_only=True)
class UseFloats(Edit):
    """Linears become FloatLinears of one type."""

    carried: ClassVar[bool] = False  # another training starts from dense weights

    modules: list[str]
    dtype: str
    activations: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(TYPES)}")

    def apply(self, model: nn.Module) -> None:
        for name in self.modules:
            linear: Any = model.get_submodule(name)
            stored = FloatLinear(
                linear.in_features, linear.out_features, dtype=TYPES[self.dtype], bias=linear.bias,
                activations=self.activations,
            )  # fmt: skip
            stored.dense = type(linear)
            replace_module(model, name, stored)


class FloatLinear(Packed):
    """y = (floats * scale) x + bias, with the weight held as floats of 8 or 16 bits.

    `floats`: (out, in) of the type. `scale`: (out, 1), or None for 16 bits. The weight that they stand for is made for
    one product at a time. `activations`: x is rounded to e4m3 floats token by token; a GPU that multiplies such floats
    does so, and then gives bfloat16.
    """

    floats: Tensor
    scale: Tensor | None
    weight = None  # T5 asks for the type of a linear's weight, where it has one

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, bias: nn.Parameter | None,
        activations: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.activations = activations
        self.bias = bias
        self.register_buffer("floats", torch.zeros(out_features, in_features).to(dtype))
        self.register_buffer("scale", torch.ones(out_features, 1) if scaled(dtype) else None)

    @property
    def holds(self) -> str:  # type: ignore[override]
        """What its tensors are, in a report."""
        return f"{self.bits}-bit floats"

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of one float."""
        return self.floats.element_size() * 8

    def store(self, floats: Tensor, scale: Tensor | None) -> None:
        """Take floats (out, in) and their scales (out, 1)."""
        assert floats.shape == self.floats.shape
        assert (scale is None) == (self.scale is None)
        self.floats = floats.to(self.floats.device)
        self.scale = None if scale is None else scale.to(self.floats.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        before = {name: tensor for name, tensor in self.named_buffers() if tensor is not None}
        moved = super()._apply(fn, recurse)
        for name, tensor in before.items():
            after: Tensor = getattr(self, name)
            if after.dtype is not tensor.dtype:  # a change of the model's type is not one of what is stored
                setattr(self, name, tensor.to(after.device))
        return moved

    @property
    def kernel(self) -> str:
        """What multiplies, where the linear is now."""
        return "float8 x float8, torch._scaled_mm" if self.rounds_inputs and runs_in_float8(self) else super().kernel

    @property
    def rounds_inputs(self) -> bool:
        """Whether what enters it is rounded."""
        return self.activations

    def dequantized(self) -> Tensor:
        """floats * scale, (out, in), bit for bit the folded weight."""
        return values_of(self.floats, self.scale)

    def forward(self, values: Tensor) -> Tensor:
        if not self.activations:
            return functional.linear(values, self.dequantized().to(values.dtype), self.bias)
        floats, scale = to_floats(values.reshape(-1, self.in_features), torch.float8_e4m3fn)
        if runs_in_float8(self):
            product = self.product(floats, scale, torch.bfloat16).to(values.dtype)
            product = product if self.bias is None else product + self.bias
        else:
            rounded = values_of(floats, scale).to(values.dtype)
            product = functional.linear(rounded, self.dequantized().to(values.dtype), self.bias)
        return product.view(*values.shape[:-1], self.out_features)

    def product(self, floats: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The product of floats (tokens, in) with scales (tokens, 1), without the bias, summed up in fp32 and then of
        `dtype`. (tokens, out)."""
        assert self.scale is not None
        return torch._scaled_mm(floats, self.floats.t(), scale, self.scale.t().contiguous(), out_dtype=dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, dtype={self.floats.dtype}"


def runs_in_float8(linear: FloatLinear) -> bool:
    """Whether the GPU that holds a linear multiplies 8-bit floats of its type and sizes."""
    place = linear.floats.device
    fits = linear.floats.dtype is torch.float8_e4m3fn and not (linear.in_features % DIVISOR)
    if place.type != "cuda" or not fits or linear.out_features % DIVISOR:
        return False
    return torch.cuda.get_device_capability(place) >= LEAST_CAPABILITY
