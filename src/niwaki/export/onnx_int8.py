"""ONNX for speed on a plain CPU: one scale for all tokens of an input, and 8 bits for what the artifact left dense.

Integer products as in Jacob et al. 2018 (arXiv:1712.05877), in the nodes of which ONNX Runtime makes one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.quantize.integers import IntegerLinear, to_codes
from niwaki.compression.quantize.tables import IntegerEmbedding, IntegerTable, UseIntegerTables, users
from niwaki.errors import ConfigError
from niwaki.export.export import Export
from niwaki.export.graphs import whole
from niwaki.export.onnx import FILE, OPSETS, described, keep_norms_apart, plain_attention, save, share_tables, traced
from niwaki.export.runner import OnnxRunner, Runner
from niwaki.model.anatomy import Anatomy
from niwaki.model.embeddings import table_of
from niwaki.tuning.beside import UseAdapter
from niwaki.weights import Packed, packed, replace_everywhere

if TYPE_CHECKING:
    from niwaki.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class OnnxInt8(Export):
    """y = s_x s_w (codes_x - zero_x) codes_w + bias, with s_x and zero_x drawn from the whole input.

    Linears with one scale per channel, and tables with one per row, keep our codes and scales. All others of the blocks
    (dense, in groups, of floats, of shared values) and the table of the embeddings are put on a symmetric 8-bit grid, a
    scale per channel or row; so is an output layer that is tied to it. An adapter beside its base is merged first.
    Inputs are rounded otherwise than in the artifact, and all rows of a batch share a scale, so the bound is on the
    scores: `tolerance`, what share of the artifact's test metric may be lost.
    """

    paper: ClassVar[str] = "Jacob et al. 2018, arXiv:1712.05877; ONNX, 2017, github.com/onnx/onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    extra: ClassVar[str] = "onnx"

    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise ConfigError(f"export.onnx_int8.tolerance={self.tolerance}: needs a number of at least 0")

    def write(self, saved: Artifact, example: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        from niwaki import artifact
        from niwaki.export import lowering

        if any(isinstance(edit, UseAdapter) for edit in saved.edits):
            artifact.merge(saved)
        model = plain_attention(saved.model)
        to_8_bits(model)
        tables_to_8_bits(model)
        held = lowering.hold_out(model)
        lowering.to_plain(model)
        graph = traced(model, whole(model, example), OPSETS[0])
        lowering.lower(graph, held, OPSETS[0], "dynamic")
        lowering.check_lowered(graph)
        share_tables(graph.graph)
        keep_norms_apart(graph.graph)
        save(graph, folder / FILE)
        return described(graph)

    def runner(self, folder: Path) -> Runner:
        return OnnxRunner(folder / FILE)

    def bound(self, model: nn.Module) -> float | None:
        return None

    def loss_allowed(self, model: nn.Module) -> float | None:
        return self.tolerance


def to_8_bits(model: nn.Module) -> None:
    """Put every linear of the blocks, and every packed one, on a symmetric 8-bit grid of its own, where it has not one
    scale per channel already."""
    found: dict[str, Any] = {**dict(packed(model)), **Anatomy.of(model).linears()}
    for linear in found.values():
        if isinstance(linear, IntegerTable) or (isinstance(linear, IntegerLinear) and has_channel_scales(linear)):
            continue
        weight = linear.dequantized() if isinstance(linear, Packed) else linear.weight.detach()
        integer = IntegerLinear(
            linear.in_features, linear.out_features, bits=8, group=None, activation_bits=8, bias=linear.bias
        )
        codes, scale = to_codes(weight.float(), 8)
        integer.store(codes.to(torch.int8), scale)
        replace_everywhere(model, linear, integer)


def has_channel_scales(linear: IntegerLinear) -> bool:
    """Whether a product of integers needs but one scale per channel afterwards: zero is a code where there is one."""
    zero = getattr(linear, "zero", None)
    return linear.scale.shape[1] == 1 and (zero is None or not zero.is_floating_point())


def tables_to_8_bits(model: Any) -> None:
    """Put the table of the embeddings, wherever rows of it are looked up and where an output layer is tied to it, on a
    symmetric 8-bit grid of its own, where it has not one scale per row already."""
    embedding: Any = table_of(model)
    if isinstance(embedding, IntegerEmbedding):
        if embedding.table.scale.shape[1] == 1:
            return
        embedding.table.put_dense(model, "")
        embedding = table_of(model)
    name = next(iter(users(model, embedding.weight)))
    codes, scale = to_codes(embedding.weight.detach().float(), 8)
    UseIntegerTables(tables=[name], bits=8, group=None).apply(model)
    integers: Any = model.get_submodule(name)
    integers.table.store(codes.to(torch.int8), scale)
