"""The kernels that multiply stored integers, and where each of them runs.

torch 2.13 on a CPU has others that were measured and left out: `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`
are slower than a product of floats where activations are fp32, and a thousandth off where they are bf16;
`_dyn_quant_matmul_4bit` and the fused linears of `torch.ops.quantized` draw a scale of the activations themselves, or
round ties another way; `onednn.qlinear_pointwise` makes its primitive anew in each call. So weights whose activations
are not rounded are dequantized once, and multiplied as fp32.
"""

from __future__ import annotations

import abc
import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from niwaki.compression.quantize.layout import Layout

LARGEST_SUM = 2**31 - 1  # that an int32 holds
LARGEST_WHOLE = 2**24  # up to which fp32 holds every integer
SLOW = 4  # times as long as products of floats
FLOAT_ORDER = 1e-4  # off by, where sums are taken in another order: of the largest logit where that is above 1
FLIPPED = 0.05  # where such a sum decides how an activation is rounded, which then moves by a whole code


def agreement(activation_bits: int | None) -> float:
    """How far the logits of a model with stored integers may be from those of the chains that they were folded from, of
    the largest one where that is above 1. Codes and scales are the chains' own; the order of sums may be another."""
    return FLIPPED if activation_bits else FLOAT_ORDER


class Product(abc.ABC):
    """Sums of products of codes (tokens, in), numbers of any type, with int8 codes (out, in): (tokens, out), exact, as
    int32 or as floats that are whole."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What a report calls it."""

    @abc.abstractmethod
    def operand(self, codes: Tensor) -> Tensor:
        """What the product takes of the weight's codes (out, in): (in, out)."""

    @abc.abstractmethod
    def __call__(self, codes: Tensor, operand: Tensor, outputs: int) -> Tensor:
        """The sums, with an operand that has so many outputs."""


@dataclass(frozen=True, kw_only=True)
class IntegerProduct(Product):
    """By `torch._int_mm`: int32.

    `rows`: the least number of tokens that it takes. `multiple`: of what the inputs and the outputs have to be. Zeros
    fill what is missing, and change no sum.
    """

    device: str
    rows: int = 1
    multiple: int = 1

    @property
    def name(self) -> str:
        return "int8 x int8, torch._int_mm" + ("" if self.device == "cpu" else f" on {self.device}")

    def operand(self, codes: Tensor) -> Tensor:
        """A view of them where nothing has to be filled. Rows of it that lie apart are read faster than those of a
        copy, where tokens are few."""
        outputs, inputs = codes.shape
        return filled(codes, -outputs % self.multiple, -inputs % self.multiple).t()

    def __call__(self, codes: Tensor, operand: Tensor, outputs: int) -> Tensor:
        tokens, inputs = codes.shape
        codes = filled(codes.to(torch.int8), max(self.rows - tokens, 0), len(operand) - inputs)
        return torch._int_mm(codes, operand)[:tokens, :outputs]


@dataclass(frozen=True, kw_only=True)
class FloatProduct(Product):
    """By products of floats that hold the codes, for CPUs whose kernel for integers is slow, or none.

    `part`: inputs of one product, so few that fp32 holds whatever they sum to, and no order of sums can be off. The
    sums of parts are added in fp64. It holds four bytes for each code.
    """

    part: int = LARGEST_WHOLE // 128**2

    @property
    def name(self) -> str:
        return "fp32, exact sums of codes"

    def operand(self, codes: Tensor) -> Tensor:
        return codes.float().t()

    def __call__(self, codes: Tensor, operand: Tensor, outputs: int) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            codes = codes.float()
            if len(operand) <= self.part:
                return codes @ operand
            sums = codes.new_zeros(len(codes), outputs, dtype=torch.float64)
            for left, right in zip(codes.split(self.part, -1), operand.split(self.part), strict=True):
                sums += left @ right
            return sums


def filled(codes: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with so many rows and columns of zeros behind it; itself where there are none."""
    return functional.pad(codes, (0, columns, 0, rows)) if rows or columns else codes


PRODUCTS = {
    "cpu": IntegerProduct(device="cpu"),
    "cuda": IntegerProduct(device="cuda", rows=17, multiple=8),  # torch refuses fewer rows, and other sizes
}


FLOATS = FloatProduct()


def sums_are_integers(layout: Layout, activation_bits: int | None, inputs: int) -> bool:
    """Whether the product of codes of this layout is a sum of integers that 32 bits hold, whatever multiplies them:
    activations are rounded, scales do not change along the inputs, and there is no zero."""
    if not activation_bits or layout.group or not layout.symmetric:
        return False
    return inputs * largest_product(layout, activation_bits) <= LARGEST_SUM


def largest_product(layout: Layout, activation_bits: int) -> int:
    """Of a code of the weight and one of an activation."""
    return layout.highest * (2 ** (activation_bits - 1) - 1)


def integer_product(device: torch.device, layout: Layout, activation_bits: int | None, inputs: int) -> Product | None:
    """The kernel for codes of this layout; None where the weight has to be dequantized: their product is no sum of
    integers, or the device has no kernel that gives exact ones."""
    if activation_bits is None or not sums_are_integers(layout, activation_bits, inputs):
        return None
    product = product_of(device.type)
    if isinstance(product, FloatProduct):
        return FloatProduct(part=LARGEST_WHOLE // largest_product(layout, activation_bits))
    return product


@cache
def product_of(device: str) -> Product | None:
    """The kernel for sums of integers on a kind of device: its own where that is exact, and on a CPU not slow."""
    own = PRODUCTS.get(device)
    if own is not None and not is_exact(own):
        own = None
    if device != "cpu":
        return own
    return own if own and not is_slow(own) else FLOATS


@cache
def is_exact(product: IntegerProduct) -> bool:
    """Whether the sums are exact here. oneDNN clips each sum of two products to 16 bits where it may not use VNNI."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        most = torch.full((2, 64), 127, dtype=torch.int8, device=product.device)
        most[1] = -127
        found = product(most, product.operand(most), 2)
        return found.tolist() == [[64 * 127**2, -64 * 127**2], [-64 * 127**2, 64 * 127**2]]


def is_slow(product: Product) -> bool:
    """Whether floats are much faster on this CPU: with AVX2 alone torch multiplies one pair of codes after the other,
    tens of times as long as floats take. The fastest of some turns each, taken by turns."""
    times: dict[Product, list[float]] = {product: [], FLOATS: []}
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        codes = torch.ones(16, 512, dtype=torch.int8, device="cpu")
        weight = torch.ones(512, 512, dtype=torch.int8, device="cpu")
        operands = {one: one.operand(weight) for one in times}
        for _ in range(8):
            for one, operand in operands.items():
                start = time.perf_counter()
                one(codes, operand, 512)
                times[one].append(time.perf_counter() - start)
    return min(times[product]) > SLOW * min(times[FLOATS])
