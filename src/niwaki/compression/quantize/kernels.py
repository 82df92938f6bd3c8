"""The kernels that multiply stored integers, and where each of them runs.

torch 2.13 on a CPU has others that were measured and left out: `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`
are slower than a product of floats where activations are fp32, and a thousandth off where they are bf16;
`_dyn_quant_matmul_4bit` and the fused linears of `torch.ops.quantized` draw a scale of the activations themselves, or
round ties another way; `onednn.qlinear_pointwise` makes its primitive anew in each call. So weights whose activations
are not rounded are dequantized once, and multiplied as fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from niwaki.compression.quantize.layout import Layout

LARGEST_SUM = 2**31 - 1  # that an int32 holds
FLOAT_ORDER = 1e-4  # off by, where sums are taken in another order: of the largest logit where that is above 1
FLIPPED = 0.05  # where such a sum decides how an activation is rounded, which then moves by a whole code


def agreement(activation_bits: int | None) -> float:
    """How far the logits of a model with stored integers may be from those of the chains that they were folded from, of
    the largest one where that is above 1. Codes and scales are the chains' own; the order of sums may be another."""
    return FLIPPED if activation_bits else FLOAT_ORDER


@dataclass(frozen=True, kw_only=True)
class IntegerProduct:
    """int8 (tokens, in) x int8 (out, in) -> int32 (tokens, out), by `torch._int_mm`.

    `rows`: the least number of tokens that it takes. `multiple`: of what the inputs and the outputs have to be. Zeros
    fill what is missing, and change no sum.
    """

    device: str
    rows: int = 1
    multiple: int = 1

    @property
    def name(self) -> str:
        """What a report calls it."""
        return "int8 x int8, torch._int_mm" + ("" if self.device == "cpu" else f" on {self.device}")

    def operand(self, codes: Tensor) -> Tensor:
        """What the product takes of codes (out, in): (in, out), a view of them where nothing has to be filled. Rows
        of it that lie apart are read faster than those of a copy, where tokens are few."""
        outputs, inputs = codes.shape
        return filled(codes, -outputs % self.multiple, -inputs % self.multiple).t()

    def __call__(self, codes: Tensor, operand: Tensor, outputs: int) -> Tensor:
        """The sums of products of input codes (tokens, in) int8 with an operand that has so many outputs."""
        tokens, inputs = codes.shape
        codes = filled(codes, max(self.rows - tokens, 0), len(operand) - inputs)
        return torch._int_mm(codes, operand)[:tokens, :outputs]


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


def integer_product(
    device: torch.device, layout: Layout, activation_bits: int | None, inputs: int
) -> IntegerProduct | None:
    """The kernel for codes of this layout; None where the weight has to be dequantized: their product is no sum of
    integers, or no kernel of the device gives exact ones."""
    if not sums_are_integers(layout, activation_bits, inputs):
        return None
    product = PRODUCTS.get(device.type)
    return product if product and is_exact(product) else None


@cache
def is_exact(product: IntegerProduct) -> bool:
    """Whether the sums are exact here. They are not on CPUs without VNNI, where oneDNN clips each sum of two products
    to 16 bits."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        most = torch.full((2, 64), 127, dtype=torch.int8, device=product.device)
        most[1] = -127
        found = product(most, product.operand(most), 2)
        return found.tolist() == [[64 * 127**2, -64 * 127**2], [-64 * 127**2, 64 * 127**2]]
