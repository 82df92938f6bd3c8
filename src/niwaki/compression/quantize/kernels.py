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
PART = 1024  # inputs, whose products of two codes of 8 bits sum to 2^24 at most: fp32 holds every integer up to there
FLOAT_ORDER = 1e-4  # off by, where sums are taken in another order: of the largest logit where that is above 1
FLIPPED = 0.05  # where such a sum decides how an activation is rounded, which then moves by a whole code


def agreement(activation_bits: int | None) -> float:
    """How far the logits of a model with stored integers may be from those of the chains that they were folded from, of
    the largest one where that is above 1. Codes and scales are the chains' own; the order of sums may be another."""
    return FLIPPED if activation_bits else FLOAT_ORDER


class Product(abc.ABC):
    """int8 codes (tokens, in) x int8 codes (out, in) -> their sums (tokens, out), exact, as int32 or whole fp32."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What a report calls it."""

    @abc.abstractmethod
    def operand(self, codes: Tensor) -> Tensor:
        """What the product takes of codes (out, in): (in, out)."""

    @abc.abstractmethod
    def __call__(self, codes: Tensor, operand: Tensor, outputs: int) -> Tensor:
        """The sums for input codes (tokens, in), of any type, with an operand that has so many outputs."""


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


class FloatProduct(Product):
    """By products of fp32 that hold the codes, `PART` inputs each, in which no order of sums can be off: for CPUs whose
    kernel for integers is none. No autocast may be around it."""

    @property
    def name(self) -> str:
        return "int8 x int8, fp32 products that are exact"

    def operand(self, codes: Tensor) -> Tensor:
        return codes.float().t()

    def __call__(self, codes: Tensor, operand: Tensor, outputs: int) -> Tensor:
        parts = zip(codes.float().split(PART, -1), operand.split(PART), strict=True)
        sums = [left @ right for left, right in parts]
        return sums[0] if len(sums) == 1 else sum((part.int() for part in sums[1:]), sums[0].int())


def filled(codes: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix with so many rows and columns of zeros behind it; itself where there are none."""
    return functional.pad(codes, (0, columns, 0, rows)) if rows or columns else codes


PRODUCTS = {
    "cpu": IntegerProduct(device="cpu"),
    "cuda": IntegerProduct(device="cuda", rows=17, multiple=8),  # torch refuses fewer rows, and other sizes
}


def sums_are_integers(layout: Layout, activation_bits: int | None, inputs: int) -> bool:
    """Whether the product of codes of this layout is a sum of integers that 32 bits hold, whatever multiplies them:
    activations are rounded, scales do not change along the inputs, and there is no zero."""
    if not activation_bits or layout.group or not layout.symmetric:
        return False
    return inputs * layout.highest * (2 ** (activation_bits - 1) - 1) <= LARGEST_SUM


def integer_product(device: torch.device, layout: Layout, activation_bits: int | None, inputs: int) -> Product | None:
    """The kernel for codes of this layout; None where the weight has to be dequantized: their product is no sum of
    integers, or the device has no kernel that gives exact ones."""
    return product_of(device.type) if sums_are_integers(layout, activation_bits, inputs) else None


@cache
def product_of(device: str) -> Product | None:
    """The kernel for sums of integers on a kind of device: its own where that is exact, and on a CPU no slower than
    half of what floats are."""
    own = PRODUCTS.get(device)
    if own is not None and not is_exact(own):
        own = None
    if device != "cpu":
        return own
    return own if own and time_of(own) < 2 * time_of(FLOATS) else FLOATS


FLOATS = FloatProduct()


@cache
def is_exact(product: IntegerProduct) -> bool:
    """Whether the sums are exact here. They are not on CPUs with AVX512 but without VNNI, where oneDNN clips each sum
    of two products to 16 bits."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        most = torch.full((2, 64), 127, dtype=torch.int8, device=product.device)
        most[1] = -127
        found = product(most, product.operand(most), 2)
        return found.tolist() == [[64 * 127**2, -64 * 127**2], [-64 * 127**2, 64 * 127**2]]


def time_of(product: Product, turns: int = 4) -> float:
    """Seconds for the sums of a few tokens on a CPU, the least of some turns. Where oneDNN has no kernel for integers
    (AVX2 alone), torch multiplies one pair of codes after the other, over a hundred times as long as floats take."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        codes, operand = torch.ones(16, 512, dtype=torch.int8), product.operand(torch.ones(512, 512, dtype=torch.int8))
        times = []
        for _ in range(turns):
            start = time.perf_counter()
            product(codes, operand, 512)
            times.append(time.perf_counter() - start)
        return min(times)
