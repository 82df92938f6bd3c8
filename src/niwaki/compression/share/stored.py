"""What is stored of shared weights: an index of a few bits for each weight, and the table of the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.edits import Edit
from niwaki.packing import pack, packed_bytes, unpack
from niwaki.weights import Packed, replace_module


def look_up(centroids: Tensor, indices: Tensor) -> Tensor:
    """The centroid of each weight: (tables, 2^bits) and (out, in) -> (out, in); as many rows share each table."""
    return centroids.flatten().index_select(0, places(centroids, indices)).view(indices.shape)


def places(centroids: Tensor, indices: Tensor) -> Tensor:
    """Where, among all centroids, that of each weight stands; flat, int32."""
    tables, size = centroids.shape
    below = torch.arange(tables, dtype=torch.int32, device=indices.device)[:, None] * size
    return (indices.reshape(tables, -1).int() + below).flatten()


@dataclass(frozen=True, kw_only=True)
class UseCodebook(Edit):
    """Linears become CodebookLinears; `modules`: the number of weights that each keeps, null where none is zero."""

    carried: ClassVar[bool] = False  # another training starts from dense weights

    modules: dict[str, int | None]
    bits: int
    rows: int | None

    def apply(self, model: nn.Module) -> None:
        for name, kept in self.modules.items():
            linear: Any = model.get_submodule(name)
            with torch.device(linear.weight.device):
                shared = CodebookLinear(
                    linear.in_features, linear.out_features, bits=self.bits, rows=self.rows, kept=kept, bias=linear.bias
                )
            shared.dense = type(linear)
            replace_module(model, name, shared)


class CodebookLinear(Packed):
    """y = W x + bias, W[i, j] = centroids[table of row i, index of (i, j)], or 0 where a weight was pruned.

    `indices`: a uint8 stream of `bits` for each weight, or for each that is kept (`kept` of them) where some are
    pruned; those are told apart by `mask`, one bit for each weight. `centroids`: (out / rows, 2^bits). The weight is
    looked up once, when it is first needed.
    """

    indices: Tensor
    centroids: Tensor
    mask: Tensor
    holds: ClassVar[str] = "codebook"
    kernel = "fp32, looked up once"
    weight = None  # T5 asks for the type of a linear's weight, where it has one

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, rows: int | None, kept: int | None,
        bias: nn.Parameter | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.kept = kept
        self.bias = bias
        count = in_features * out_features
        stored = count if kept is None else kept
        self.register_buffer("indices", torch.zeros(packed_bytes(stored, bits), dtype=torch.uint8))
        self.register_buffer("centroids", torch.zeros(out_features // (rows or out_features), 2**bits))
        if kept is not None:
            self.register_buffer("mask", torch.zeros(packed_bytes(count, 1), dtype=torch.uint8))

    @property
    def zeros_without_code(self) -> int:
        """Weights that were pruned, which have no index."""
        return 0 if self.kept is None else self.in_features * self.out_features - self.kept

    def store(self, indices: Tensor, centroids: Tensor, mask: Tensor | None) -> None:
        """Take indices (out, in), centroids (tables, 2^bits), and where a weight is kept (out, in), if not anywhere."""
        device = self.centroids.device
        self.centroids = centroids.to(device)
        self.indices = pack(indices if mask is None else indices[mask], self.bits).to(device)
        if mask is not None:
            self.mask = pack(mask, 1).to(device)
        self._operand = None

    def dequantized(self) -> Tensor:
        """The weight, (out, in), bit for bit the folded one."""
        count = self.in_features * self.out_features
        shape = (self.out_features, self.in_features)
        if self.kept is None:
            return look_up(self.centroids, unpack(self.indices, self.bits, count).view(shape))
        mask = unpack(self.mask, 1, count).bool()
        indices = torch.zeros(count, dtype=torch.uint8, device=mask.device)
        indices[mask] = unpack(self.indices, self.bits, self.kept)
        return look_up(self.centroids, indices.view(shape)).masked_fill_(~mask.view(shape), 0.0)

    def forward(self, values: Tensor) -> Tensor:
        if self._operand is None:
            with torch.inference_mode(False), torch.no_grad():  # it may be used under a gradient later
                self._operand = self.dequantized()
        return functional.linear(values, self._operand, self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, kept={self.kept}"
