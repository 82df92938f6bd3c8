"""NormalFloat: 4-bit weights on the quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314).

Why a layer of our own: torchao's NF4Tensor (0.18) and bitsandbytes' Linear4bit (0.50) both train below a LoRA on the
CPU, but safetensors cannot write an NF4Tensor (it has no storage of its own, so tied weights cannot be told apart
either), and a Linear4bit cannot load its own state dict back, nor move to the meta device. Here the codes are plain
buffers, which checkpoints, safetensors and edits take as they are. The levels are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from niwaki.compression.quantize.integers import to_codes
from niwaki.edits import Edit
from niwaki.weights import Packed, replace_module

# Appendix E of the paper: quantiles of N(0, 1), 7 below zero and 8 above it, scaled to -1..1, with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SCALES_IN_A_BLOCK = 256  # that share a scale of their own under double quantization


@cache
def pairs(device: torch.device) -> Tensor:
    """The two levels in each of the 256 bytes, the high half first. (256, 2)."""
    with torch.inference_mode(False):
        levels = torch.tensor(LEVELS, device=device)
        byte = torch.arange(256, device=device)
        return torch.stack([levels[byte >> 4], levels[byte & 15]], 1)


def nearest_level(values: Tensor) -> Tensor:
    """The index of the level nearest to each of `values`, which lie in -1..1. uint8."""
    levels = torch.tensor(LEVELS, device=values.device)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def in_rows(values: Tensor, length: int) -> Tensor:
    """`values` flat, then in rows of `length`; zeros fill the last one."""
    return functional.pad(values.flatten(), (0, -values.numel() % length)).view(-1, length)


class Product(torch.autograd.Function):
    """x -> x W^T + b. W is dequantized again for the backward pass rather than kept for it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor | None, layer: NormalFloatLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, values.dtype
        return functional.linear(values, layer.dequantized().to(values.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        to_values = to_bias = None
        if ctx.needs_input_grad[0]:
            to_values = (gradient @ ctx.layer.dequantized().to(gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.flatten(0, -2).sum(0)
        return to_values, to_bias, None


class NormalFloatLinear(nn.Linear, Packed):
    """y = W x + b with W = level[code] * scale, one scale (the largest magnitude) for each `block` of weights.

    `weight`: int8, two codes a byte, blocks of the flattened (out, in) weight; T5 casts what enters its feed-forward to
    the type of any weight but int8. `scale`: fp32 (blocks,). Under double
    quantization `scale` is int8, and fp32 values are `scale_scale` for 256 of them and `scale_mean` for all:
    scale = code * scale_scale + scale_mean. W is frozen: nothing here has a gradient but the bias and the input.
    """

    weight: Tensor
    scale: Tensor
    bits = 4
    holds = "NormalFloat codes"
    kernel = "fp32, dequantized in each product"

    def __init__(
        self, in_features: int, out_features: int, *, block: int, double_quantization: bool, bias: nn.Parameter | None
    ) -> None:
        nn.Module.__init__(self)  # a Linear's own would make a dense weight
        self.in_features = in_features
        self.out_features = out_features
        self.block = block
        self.double_quantization = double_quantization
        blocks = -(-in_features * out_features // block)
        self.register_buffer("weight", torch.zeros(blocks * block // 2, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(blocks, dtype=torch.int8 if double_quantization else torch.float32))
        if double_quantization:
            self.register_buffer("scale_scale", torch.zeros(-(-blocks // SCALES_IN_A_BLOCK)))
            self.register_buffer("scale_mean", torch.zeros(()))
        self.bias = bias  # type: ignore[assignment]

    def store(self, weight: Tensor) -> None:
        """Take the nearest codes to a dense weight (out, in)."""
        rows = in_rows(weight.detach().float(), self.block)
        scale = rows.abs().amax(1)
        codes = nearest_level(rows / torch.where(scale > 0, scale, 1.0)[:, None]).view(-1, 2)
        self.weight.view(torch.uint8).copy_(codes[:, 0] << 4 | codes[:, 1])
        self._store_scale(scale)

    def _store_scale(self, scale: Tensor) -> None:
        if self.double_quantization:
            self.scale_mean = scale.mean()
            codes, self.scale_scale = to_codes(in_rows(scale - self.scale_mean, SCALES_IN_A_BLOCK), 8)
            self.scale_scale = self.scale_scale.flatten()
            scale = codes.flatten()[: len(scale)]
        self.scale.copy_(scale)

    def scales(self) -> Tensor:
        """The scale of each block, fp32 (blocks,)."""
        if not self.double_quantization:
            return self.scale.float()
        rows = in_rows(self.scale.float(), SCALES_IN_A_BLOCK) * self.scale_scale[:, None]
        return rows.flatten()[: len(self.scale)] + self.scale_mean

    def dequantized(self) -> Tensor:
        """W, fp32 (out, in); a new tensor, which nothing keeps."""
        bytes_ = self.weight.view(torch.uint8).int()
        values = functional.embedding(bytes_, pairs(self.weight.device)).view(-1, self.block)
        values = values.mul_(self.scales()[:, None]).flatten()
        return values[: self.in_features * self.out_features].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return Product.apply(input, self.bias, self)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, block={self.block}"


@dataclass(frozen=True, kw_only=True)
class UseNormalFloat(Edit):
    """Linears become NormalFloatLinears of one layout."""

    carried: ClassVar[bool] = False  # another training starts from dense weights

    modules: Sequence[str]
    block: int
    double_quantization: bool

    def apply(self, model: nn.Module) -> None:
        for name in self.modules:
            linear: Any = model.get_submodule(name)
            packed = NormalFloatLinear(
                linear.in_features, linear.out_features, block=self.block,
                double_quantization=self.double_quantization, bias=linear.bias,
            )  # fmt: skip
            packed.dense = type(linear)
            replace_module(model, name, packed)


def quantize(model: nn.Module, edit: UseNormalFloat) -> None:
    """Put the weights of the edit's linears into 4 bits, one by one, so that their dense ones can be freed."""
    for name in edit.modules:
        dense: Any = model.get_submodule(name)
        UseNormalFloat(modules=[name], block=edit.block, double_quantization=edit.double_quantization).apply(model)
        packed: Any = model.get_submodule(name)
        packed.to(dense.weight.device).store(dense.weight)
