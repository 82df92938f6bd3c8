"""Tables of embeddings stored as integers, at both ends of a model that multiplies with them as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.quantize.integers import pack, unpack
from niwaki.compression.quantize.layout import Layout, values_of
from niwaki.edits import Edit
from niwaki.model.embeddings import FactorizedOutput
from niwaki.weights import Packed, replace_everywhere


class IntegerTable(Packed):
    """E = codes * scale, (tokens, width), with the codes stored as integers of `bits` each.

    `codes`: int8 (tokens, width) for 8 bits, else a uint8 stream with nothing between the codes. `scale`: (tokens,
    groups). `rows` makes values of those rows alone that are looked up; a product takes the whole table, which is made
    once and kept.
    """

    codes: Tensor
    scale: Tensor
    holds: ClassVar[str] = "integer codes of embeddings"
    bias = None

    def __init__(self, tokens: int, width: int, *, bits: int, group: int | None) -> None:
        super().__init__()
        self.out_features = tokens
        self.in_features = width
        self.layout = Layout(bits=bits, group=group)
        self.bits = bits
        shape = (tokens, width) if bits == 8 else (-(-tokens * width * bits // 8),)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8 if bits == 8 else torch.uint8))
        self.register_buffer("scale", torch.ones(tokens, width // group if group else 1))

    @property
    def kernel(self) -> str:
        """What makes floats of its rows, or of all where an output layer multiplies with them."""
        return "fp32, rows looked up"

    def store(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes (tokens, width) int8 and their scales (tokens, groups)."""
        device = self.scale.device
        self.codes = (codes if self.bits == 8 else pack(codes.cpu(), self.layout)).to(device)
        self.scale = scale.to(device)
        self._operand = None

    def integers(self) -> Tensor:
        """All codes, (tokens, width) int8."""
        if self.bits == 8:
            return self.codes
        return unpack(self.codes, self.layout, (self.out_features, self.in_features)).to(self.codes.device)

    def codes_of(self, numbers: Tensor) -> Tensor:
        """The codes of some rows, (..., width), out of the bytes that hold them."""
        if self.bits == 8:
            return self.codes[numbers]
        width, bits = self.in_features, self.bits
        places = numbers[..., None] * (width * bits) + torch.arange(width, device=numbers.device) * bits
        byte, inside = places // 8, places % 8
        behind = (byte + 1).clamp(max=len(self.codes) - 1)  # of a code that lies across two
        both = self.codes[byte].to(torch.int32) << 8 | self.codes[behind].to(torch.int32)
        return (both >> (16 - bits - inside) & 2**bits - 1) - self.layout.offset

    def rows(self, numbers: Tensor) -> Tensor:
        """The embeddings of some tokens, (..., width)."""
        grouped = self.codes_of(numbers).unflatten(-1, (self.scale.shape[1], -1))
        return values_of(grouped, self.scale[numbers][..., None], None).flatten(-2).to(self.scale.dtype)

    def dequantized(self) -> Tensor:
        grouped = self.layout.grouped(self.integers())
        return values_of(grouped, self.scale[..., None], None).view(self.out_features, self.in_features)

    def whole(self) -> Tensor:
        """The table as a product takes it, made once."""
        if self._operand is None:
            with torch.inference_mode(False), torch.no_grad():  # it may be used under a gradient later
                self._operand = self.dequantized().to(self.scale.dtype)
        return self._operand

    def forward(self, values: Tensor) -> Tensor:
        """(..., width) -> (..., tokens): a product with all rows."""
        return functional.linear(values, self.whole())

    def put_dense(self, model: nn.Module, name: str) -> None:
        weight = nn.Parameter(self.dequantized())
        for module in list(model.modules()):
            if isinstance(module, OfTable) and module.table is self:
                replace_everywhere(model, module, module.dense(weight))

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, bits={self.bits}, group={self.layout.group}"


class OfTable(nn.Module):
    """What an integer table does in place of a dense module, which it keeps, without its weight, for when that is
    wanted back."""

    def __init__(self, table: IntegerTable, stands_for: Any) -> None:
        super().__init__()
        self.table = table
        stands_for._parameters["weight"] = None
        self._stands_for = (stands_for,)  # in a tuple, so that it is no child

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, (tokens, width)."""
        return self.table.whole()

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """The module that it stands for, with this weight."""
        (module,) = self._stands_for
        module._parameters["weight"] = weight
        return module


class IntegerEmbedding(OfTable):
    """E(token) = codes[token] * scale[token], times `factor` where the model has one (BART's embed_scale)."""

    def __init__(self, table: IntegerTable, stands_for: nn.Embedding) -> None:
        super().__init__(table, stands_for)
        self.num_embeddings = stands_for.num_embeddings
        self.embedding_dim = stands_for.embedding_dim
        self.padding_idx = stands_for.padding_idx
        self.factor = getattr(stands_for, "embed_scale", None)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.table.rows(tokens)
        return rows if self.factor is None else rows * self.factor


class IntegerOutput(OfTable):
    """logits = E h + bias: an output layer that is tied to the table."""

    def __init__(self, table: IntegerTable, stands_for: Any) -> None:
        super().__init__(table, stands_for)
        self.in_features = table.in_features
        self.out_features = table.out_features
        self.bias = getattr(stands_for, "bias", None)

    def forward(self, values: Tensor) -> Tensor:
        return functional.linear(values, self.table.whole(), self.bias)


def users(model: nn.Module, weight: Any) -> dict[str, nn.Module]:
    """The modules that have this parameter, by their first names: those that look rows up, then those that multiply."""
    found = {name: module for name, module in model.named_modules() if has(module, weight)}
    return dict(sorted(found.items(), key=lambda one: not isinstance(one[1], nn.Embedding)))


def has(module: nn.Module, weight: Any) -> bool:
    """Whether this parameter is a module's own, below its links where there are some."""
    return getattr(module, "_parameters", {}).get("weight") is weight


@dataclass(frozen=True, kw_only=True)
class UseIntegerTables(Edit):
    """Tables of embeddings become integers, as do the output layers that are tied to them. `tables`: one name
    of each."""

    carried: ClassVar[bool] = False  # another training starts from dense weights

    tables: Sequence[str]
    bits: int
    group: int | None

    def apply(self, model: nn.Module) -> None:
        for name in self.tables:
            first: Any = model.get_submodule(name)
            tokens, width = first.weight.shape
            table = IntegerTable(tokens, width, bits=self.bits, group=self.group).to(first.weight.device)
            looking = users(model, first.weight).values()
            for output in [m for m in model.modules() if isinstance(m, FactorizedOutput) and m.table in looking]:
                output.table = IntegerOutput(table, output.table)
            for module in looking:
                kind = IntegerEmbedding if isinstance(module, nn.Embedding) else IntegerOutput
                replace_everywhere(model, module, kind(table, module))  # type: ignore[arg-type]
