"""Packed linears as nodes of ONNX: our own codes and scales stand in the file, none is drawn anew.

The exporter sees a placeholder where a packed linear stands, so it can neither fold its codes into floats nor trace
what makes them; the nodes of its kind then take its place (`LOWERINGS`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from niwaki import packing
from niwaki.compression.quantize.floats import FloatLinear
from niwaki.compression.quantize.integers import IntegerLinear, largest_code
from niwaki.compression.quantize.kernels import sums_are_integers
from niwaki.compression.quantize.tables import IntegerEmbedding, OfTable
from niwaki.compression.share.stored import CodebookLinear, unpack
from niwaki.export.export import ExportError
from niwaki.weights import Packed, replace_everywhere, replace_module

DOMAIN = "niwaki"
MICROSOFT = "com.microsoft"
TYPES_OF_2_BITS = 25  # the opset that brings them
NARROW = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}
UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8, 16: ir.DataType.UINT16}
FLOATS = {
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN, torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
    torch.bfloat16: ir.DataType.BFLOAT16,
}  # fmt: skip
LEAST_BLOCK = 16  # of MatMulNBits, which takes powers of two from there
SMALLEST = float(np.finfo(np.float32).tiny)
UNSIGNED_ZERO = 128  # stands for 0 among codes that are stored without a sign
BLOCK = 32  # where one scale serves a whole row


@dataclass
class Table:
    """A table of embeddings on a symmetric grid of `bits`: `codes` (rows, width) int8, `scale` (rows, groups)."""

    key: str  # of what the file holds of it
    codes: Tensor
    scale: Tensor
    bits: int = 8


@dataclass
class Rows:
    """What looks rows of a table up, and multiplies them by a `factor` where there is one."""

    table: Table
    factor: float | None = None

    @property
    def out_features(self) -> int:
        return self.table.codes.shape[1]


@dataclass
class TiedHead:
    """An output layer whose weight is a table."""

    table: Table
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return self.table.codes.shape[0]


class Placeholder(nn.Module):
    """Stands for a packed linear, or for what else ends in nodes of ours, while the model around it is traced."""

    weight = None  # T5 asks for the type of a linear's weight, where it has one

    def __init__(self, key: str, packed: Packed | Rows | TiedHead) -> None:
        super().__init__()
        self.key = key
        self.out_features = packed.out_features
        self.of_numbers = isinstance(packed, Rows)

    def forward(self, values: Tensor) -> Tensor:
        before = values.shape if self.of_numbers else values.shape[:-1]
        found: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Packed", (values,), {"key": self.key}, dtype=torch.float32,
            shape=[*before, self.out_features], version=1,
        )  # fmt: skip
        return found


@dataclass
class Graph:
    """Where the nodes of one use of a packed linear gather. What does not depend on the input is `known` to all uses of
    it: a block that runs twice holds its weights once."""

    key: str
    opset: int
    kernels: str = "portable"
    known: dict[str, Any] = field(default_factory=dict)
    tape: Any = field(default_factory=ir.tape.Tape)
    count: int = 0

    def node(self, kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> Any:
        """The output of a new node."""
        return self.tape.op(kind, list(inputs), attributes or None, domain=domain)

    def constant(self, value: Tensor | np.ndarray[Any, Any], dtype: Any = None, name: str = "") -> Any:
        """An initializer, as narrow as its type: 4-bit numbers take half a byte each."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        self.count += 1
        name = f"{self.key}.{name or self.count}"
        if name not in self.known:
            narrow = dtype is not None and dtype.bitwidth < 8
            tensor = packed_tensor(array, dtype, name) if narrow else ir.tensor(array, dtype=dtype, name=name)
            self.known[name] = self.tape.initializer(tensor)
        return self.known[name]

    def once(self, make: Callable[[], Any]) -> Any:
        """The weight, whose nodes are made by `make` for the first use."""
        if "weight" not in self.known:
            self.known["weight"] = make()
        return self.known["weight"]

    def scalar(self, value: float) -> Any:
        """A number, fp32."""
        return self.constant(np.array(value, dtype=np.float32))

    def codes(self, bits: int) -> Any:
        """The narrowest type that holds codes of so many bits."""
        width = next(width for width in NARROW if width >= bits)
        return NARROW[4 if width == 2 and self.opset < TYPES_OF_2_BITS else width]


def packed_tensor(array: np.ndarray[Any, Any], dtype: Any, name: str) -> Any:
    """Numbers of 2 or 4 bits, the first one in the lowest bits of its byte."""
    bits, flat = dtype.bitwidth, array.astype(np.uint8).ravel() & (2**dtype.bitwidth - 1)
    each = 8 // bits
    rows = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    packed = np.bitwise_or.reduce(rows << (np.arange(each, dtype=np.uint8) * bits), axis=1).astype(np.uint8)
    return ir.PackedTensor(packed, dtype, shape=ir.Shape(array.shape), name=name)


def hold_out(model: nn.Module) -> dict[str, Any]:
    """Put a placeholder wherever a packed linear stands, or what reads an integer table; what is lowered in their
    place, by the keys of the placeholders."""
    standing: dict[str, Any] = {}
    for name, module in list(model.named_modules()):
        inside = any(name.startswith(f"{outer}.") for outer in standing)  # shared values below integers
        if isinstance(module, OfTable) or (type(module) in LOWERINGS and not inside):
            standing[name] = module
    tables = {module.table: name for name, module in reversed(standing.items()) if isinstance(module, OfTable)}
    made = {table: Table(name, table.integers(), table.scale, table.bits) for table, name in tables.items()}
    held = {name: of_table(one, made[one.table]) if isinstance(one, OfTable) else one for name, one in standing.items()}
    for name, module in standing.items():
        replace_everywhere(model, module, Placeholder(name, held[name]))
    return held


def of_table(module: OfTable, table: Table) -> Rows | TiedHead:
    """What is lowered in place of a module that reads an integer table."""
    if isinstance(module, IntegerEmbedding):
        return Rows(table, module.factor)
    return TiedHead(table, getattr(module, "bias", None))


def to_plain(model: nn.Module) -> None:
    """Put a dense linear where a packed one stands that no operators of ONNX are known for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Packed):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.dequantized(), requires_grad=False)
            linear.bias = module.bias
            replace_module(model, name, linear)


def lower(model: Any, held: dict[str, Any], opset: int, kernels: str = "portable") -> None:
    """Put the nodes of each packed linear in place of its placeholders."""
    domains: set[str] = set()
    whose = {key: one.table.key if isinstance(one, Rows | TiedHead) else key for key, one in held.items()}
    known: dict[str, dict[str, Any]] = {key: {} for key in whose.values()}
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        key = node.attributes["key"].as_string()
        graph = Graph(key, opset, kernels, known[whose[key]])
        product = LOWERINGS[type(held[key])](held[key], node.inputs[0], graph)
        for value in graph.tape.initializers:
            model.graph.register_initializer(value)
        domains |= {one.domain for one in graph.tape.nodes}
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], graph.tape.nodes, node.outputs, [product]
        )  # fmt: skip
    model.opset_imports.pop(DOMAIN, None)
    for domain in domains - {""}:
        model.opset_imports[domain] = 1


def integer_linear(module: IntegerLinear, values: Any, graph: Graph) -> Any:
    """IntegerLinear.forward, step by step; on integers wherever the layout allows it, on whatever machine it is made:
    a runtime has kernels of its own."""
    if (factor := getattr(module, "factor", None)) is not None:
        values = graph.node("Mul", values, graph.constant(factor.float(), name="factor"))
    if graph.kernels == "dynamic":
        return dynamic_product(module, values, graph)
    if not module.activation_bits:
        return dequantized_product(module, values, graph)
    codes, scale = rounded(module, values, graph)
    if not sums_are_integers(module.layout, module.activation_bits, module.in_features):
        return dequantized_product(module, graph.node("Mul", codes, scale), graph)
    product = integer_product(module, codes, graph)
    product = graph.node("Mul", graph.node("Cast", product, to=ir.DataType.FLOAT), scale)
    product = graph.node("Mul", product, graph.constant(module.scale[:, 0].float(), name="scale"))
    return with_bias(module, product, graph)


def rounded(module: IntegerLinear, values: Any, graph: Graph) -> tuple[Any, Any]:
    """Codes (floats) and scale of the input: drawn from each token, or the one that was measured before."""
    largest = largest_code(int(module.activation_bits or 8))
    static = getattr(module, "input_scale", None)
    if static is not None:
        scale = graph.constant(static.float().reshape(()), name="input_scale")
        codes = graph.node("Round", graph.node("Div", values, scale))
        return graph.node("Clip", codes, graph.scalar(-largest), graph.scalar(largest)), scale
    axes = graph.constant(np.array([-1], dtype=np.int64))
    scale = graph.node("Div", graph.node("ReduceMax", graph.node("Abs", values), axes, keepdims=1),
                       graph.scalar(largest))  # fmt: skip
    scale = graph.node("Max", scale, graph.scalar(SMALLEST))  # of a token of zeros, whose codes are 0 with any scale
    return graph.node("Round", graph.node("Div", values, scale)), scale


def integer_product(module: IntegerLinear, codes: Any, graph: Graph) -> Any:
    """int32 sums of products of codes. Those of the input are uint8, 128 standing for 0: ONNX Runtime takes ten times
    as long for int8 by int8 on most CPUs."""
    weight = graph.once(lambda: turned_codes(module, graph))
    shifted = graph.node("Cast", graph.node("Add", codes, graph.scalar(UNSIGNED_ZERO)), to=ir.DataType.UINT8)
    zero = graph.constant(np.array(UNSIGNED_ZERO, dtype=np.uint8), name="input_zero")
    return graph.node("MatMulInteger", shifted, weight, zero)


def turned_codes(module: IntegerLinear, graph: Graph) -> Any:
    """The codes (in, out) as int8, however narrow they are stored."""
    kind = graph.codes(module.bits)
    codes = graph.constant(module.integers().t(), kind, "codes")
    return codes if kind is ir.DataType.INT8 else graph.node("Cast", codes, to=ir.DataType.INT8)


def dynamic_product(module: IntegerLinear, values: Any, graph: Graph) -> Any:
    """A product whose input is rounded by one scale for all tokens, in the nodes that ONNX Runtime makes one of; the
    linear has one scale per channel."""
    assert module.scale.shape[1] == 1, graph.key
    weight = graph.once(lambda: turned_codes(module, graph))
    points = [] if (zero := zero_points(module)) is None else [
        graph.constant(zero[:, 0].to(torch.int8), ir.DataType.INT8, "zero")
    ]  # fmt: skip
    product = dynamic_sums(values, weight, points, graph.constant(module.scale[:, 0].float(), name="scale"), graph)
    return with_bias(module, product, graph)


def dynamic_sums(values: Any, weight: Any, points: list[Any], scale: Any, graph: Graph) -> Any:
    """round(x / s) W s scale, with s and the zero point of x drawn from all of x."""
    codes, own, point = graph.tape.op_multi_out("DynamicQuantizeLinear", [values], num_outputs=3)
    product = graph.node("MatMulInteger", codes, weight, point, *points)
    return graph.node("Mul", graph.node("Cast", product, to=ir.DataType.FLOAT), graph.node("Mul", own, scale))


def table_rows(rows: Rows, numbers: Any, graph: Graph) -> Any:
    """The rows of a table, by their numbers: their codes and scales are looked up, no other is made a float."""
    held = replace(graph, key=rows.table.key)
    whole = table_codes(rows.table, held), table_scale(rows.table, held)
    codes, scale = (graph.node("Gather", one, numbers, axis=0) for one in whole)
    found = table_values(rows.table, codes, scale, graph.node("Shape", numbers), held)
    return found if rows.factor is None else graph.node("Mul", found, graph.scalar(rows.factor))


def tied_head(head: TiedHead, values: Any, graph: Graph) -> Any:
    """A product with a table, which the file holds once."""
    held = replace(graph, key=head.table.key)
    codes = table_codes(head.table, held)
    if graph.kernels == "dynamic":
        assert head.table.scale.shape[1] == 1, graph.key
        weight = graph.once(lambda: graph.node("Transpose", codes, perm=[1, 0]))
        product = dynamic_sums(
            values, weight, [], graph.constant(head.table.scale[:, 0].float(), name="scale"), graph
        )  # fmt: skip
    else:
        weight = graph.once(lambda: graph.node("Transpose", whole_table(head.table, codes, held), perm=[1, 0]))
        product = graph.node("MatMul", values, weight)
    return product if head.bias is None else graph.node("Add", product, graph.constant(head.bias, name="bias"))


def whole_table(table: Table, codes: Any, graph: Graph) -> Any:
    """The values of all rows of a table. Plain products of floats, of which no runtime makes one that rounds inputs."""
    rows = graph.constant(np.array([len(table.codes)], dtype=np.int64), name="rows")
    return table_values(table, codes, table_scale(table, graph), rows, graph)


def bits_in_file(table: Table, kernels: str) -> int:
    """Of a code: 2 or 4 where such codes fill whole bytes of a row and nothing multiplies with them as integers."""
    bits = next(width for width in NARROW if width >= table.bits)
    return 8 if kernels == "dynamic" or table.codes.shape[1] % (8 // bits) else bits


def table_codes(table: Table, graph: Graph) -> Any:
    """The codes of a table: int8, or several in a byte, the first one in its highest bits, since rows of narrower
    types cannot be looked up."""
    bits = bits_in_file(table, graph.kernels)
    if bits == 8:
        return graph.constant(table.codes, name="codes")
    unsigned = table.codes.to(torch.int16) + largest_code(bits)
    return graph.constant(packing.pack(unsigned, bits).view(len(table.codes), -1), name="codes")


def table_scale(table: Table, graph: Graph) -> Any:
    """The scales of a table, (rows, groups)."""
    return graph.constant(table.scale.float(), name="scale")


def table_values(table: Table, codes: Any, scale: Any, before: Any, graph: Graph) -> Any:
    """codes * scale of rows of a table, (*before, width)."""
    groups, width, bits = table.scale.shape[1], table.codes.shape[1], bits_in_file(table, graph.kernels)
    last = graph.constant(np.array([-1], dtype=np.int64), name="last")
    if bits < 8:
        shifts = graph.constant(np.arange(8 - bits, -1, -bits, dtype=np.uint8), name="shifts")
        bytes_of_one = graph.node("BitShift", graph.node("Unsqueeze", codes, last), shifts, direction="RIGHT")
        unsigned = graph.node(
            "BitwiseAnd", bytes_of_one, graph.constant(np.array(2**bits - 1, dtype=np.uint8), name="ones")
        )  # fmt: skip
        offset = graph.constant(np.array(largest_code(bits), dtype=np.float32), name="offset")
        values = graph.node("Sub", graph.node("Cast", unsigned, to=ir.DataType.FLOAT), offset)
    else:
        values = graph.node("Cast", codes, to=ir.DataType.FLOAT)
    if bits == 8 and groups == 1:
        return graph.node("Mul", values, scale)
    by_group, flat = (
        graph.node("Concat", before, graph.constant(np.array(sizes, dtype=np.int64), name=name), axis=0)
        for name, sizes in (("groups", [groups, width // groups]), ("width", [width]))
    )
    product = graph.node("Mul", graph.node("Reshape", values, by_group), graph.node("Unsqueeze", scale, last))
    return graph.node("Reshape", product, flat)


def zero_points(module: IntegerLinear) -> Tensor | None:
    """The code of zero (out, groups), where that is not 0: whole, or a real number."""
    zero: Tensor | None = getattr(module, "zero", None)
    return zero


def dequantized_product(module: IntegerLinear, values: Any, graph: Graph) -> Any:
    """A product with (codes - zero) * scale, by groups of inputs where there are some."""
    if graph.kernels == "onnxruntime" and (fused := block_product(module, values, graph)) is not None:
        return fused
    weight = graph.once(lambda: dequantized(module, graph))
    return with_bias(module, graph.node("MatMul", values, weight), graph)


def dequantized(module: IntegerLinear, graph: Graph) -> Any:
    """(codes - zero) * scale, (in, out).

    The codes lie as (out, in), in blocks even where a row has one scale, with zero points even where they are 0: of
    other forms ONNX Runtime makes products whose inputs it may round to 8 bits.
    """
    kind, zero = graph.codes(module.bits), zero_points(module)
    codes = graph.constant(module.integers(), kind, "codes")
    if zero is not None and zero.is_floating_point():
        return graph.node("Transpose", off_a_real_zero(module, codes, zero, graph), perm=[1, 0])
    scale = graph.constant(module.scale.float(), name="scale")
    zero = torch.zeros_like(module.scale) if zero is None else zero
    points = graph.constant(zero.to(torch.int8), kind, "zero")
    block = module.in_features // module.scale.shape[1]
    weight = graph.node("DequantizeLinear", codes, scale, points, axis=1, block_size=block)
    return graph.node("Transpose", weight, perm=[1, 0])


def off_a_real_zero(module: IntegerLinear, codes: Any, zero: Tensor, graph: Graph) -> Any:
    """(codes - zero) * scale, (out, in), for a zero that DequantizeLinear does not take."""
    groups = module.scale.shape[1]
    rows = module.out_features
    by_group, whole = (graph.constant(np.array(shape)) for shape in ((rows, groups, -1), (rows, -1)))
    points, scale = (
        graph.constant(one.float()[:, :, None], name=name) for one, name in ((zero, "zero"), (module.scale, "scale"))
    )
    grouped = graph.node("Reshape", graph.node("Cast", codes, to=ir.DataType.FLOAT), by_group)
    return graph.node("Reshape", graph.node("Mul", graph.node("Sub", grouped, points), scale), whole)


def block_product(module: IntegerLinear, values: Any, graph: Graph) -> Any:
    """MatMulNBits of ONNX Runtime, for codes of 3 or 4 bits whose groups it can take; else None."""
    groups = module.scale.shape[1]
    block = module.in_features // groups if groups > 1 else BLOCK
    if module.bits not in (3, 4) or block < LEAST_BLOCK or block & (block - 1):
        return None
    rows, blocks, zero = module.out_features, -(-module.in_features // block), zero_points(module)
    if zero is not None and zero.is_floating_point():
        return None
    zero = torch.zeros_like(module.scale) if zero is None else zero
    scale, zero = (one if groups > 1 else one[:, :1].expand(rows, blocks) for one in (module.scale, zero))
    codes = torch.zeros(rows, blocks * block, dtype=torch.int16)  # 0 behind the end, where the input is 0 too
    codes[:, : module.in_features] = module.integers().cpu()
    nibbles = (codes + 8).numpy().astype(np.uint8).reshape(rows, blocks, block // 2, 2)
    packed = nibbles[..., 0] | nibbles[..., 1] << 4
    points = np.pad((zero.cpu().to(torch.int16) + 8).numpy().astype(np.uint8), ((0, 0), (0, blocks % 2)))
    points = points.reshape(rows, -1, 2)
    given = [
        graph.constant(packed, ir.DataType.UINT8, "codes"),
        graph.constant(scale.float().reshape(-1), name="scale"),
        graph.constant((points[..., 0] | points[..., 1] << 4).reshape(-1), ir.DataType.UINT8, "zero"),
    ]
    product = graph.node(
        "MatMulNBits", values, *given, domain=MICROSOFT,
        K=module.in_features, N=rows, bits=4, block_size=block, accuracy_level=1,
    )  # fmt: skip
    return with_bias(module, product, graph)


def float_linear(module: FloatLinear, values: Any, graph: Graph) -> Any:
    """FloatLinear.forward: the weight is stored as it is here, and becomes fp32 in the graph."""
    if module.activations:
        values = as_float8(values, graph)
    weight = graph.once(lambda: widened(module, graph))
    return with_bias(module, graph.node("MatMul", values, weight), graph)


def widened(module: FloatLinear, graph: Graph) -> Any:
    """floats * scale, (in, out)."""
    kind = FLOATS[module.floats.dtype]
    bits = module.floats.cpu().view(torch.uint8 if module.bits == 8 else torch.uint16).numpy()
    floats = graph.constant(bits.view(kind.numpy()), kind, "floats")
    weight = graph.node("Cast", floats, to=ir.DataType.FLOAT)
    if module.scale is not None:
        weight = graph.node("Mul", weight, graph.constant(module.scale.float(), name="scale"))
    return graph.node("Transpose", weight, perm=[1, 0])


def as_float8(values: Any, graph: Graph) -> Any:
    """Values rounded to e4m3 floats, with a scale for each token."""
    axes, largest = graph.constant(np.array([-1], dtype=np.int64)), graph.scalar(torch.finfo(torch.float8_e4m3fn).max)
    scale = graph.node("Div", graph.node("ReduceMax", graph.node("Abs", values), axes, keepdims=1), largest)
    scale = graph.node("Where", graph.node("Greater", scale, graph.scalar(0.0)), scale, graph.scalar(1.0))
    floats = graph.node("Cast", graph.node("Div", values, scale), to=ir.DataType.FLOAT8E4M3FN)
    return graph.node("Mul", graph.node("Cast", floats, to=ir.DataType.FLOAT), scale)


def codebook_linear(module: CodebookLinear, values: Any, graph: Graph) -> Any:
    """A product with the values that are shared."""
    weight = graph.once(lambda: gathered(module, graph))
    return with_bias(module, graph.node("MatMul", values, weight), graph)


def gathered(module: CodebookLinear, graph: Graph) -> Any:
    """Centroids by their indices, (in, out). Where weights are pruned, each table has a zero more."""
    count, rows = module.in_features * module.out_features, module.out_features
    tables = module.centroids.shape[0]
    table = module.centroids.float()
    if module.kept is None:
        indices = unpack(module.indices, module.bits, count).to(torch.int32)
    else:
        indices = torch.full((count,), table.shape[1], dtype=torch.int32)
        indices[unpack(module.mask, 1, count).bool()] = unpack(module.indices, module.bits, module.kept).int()
        table = torch.cat([table, table.new_zeros(tables, 1)], 1)
    size = table.shape[1]
    width = next(width for width in UNSIGNED if 2**width >= size)
    width = 4 if width == 2 and graph.opset < TYPES_OF_2_BITS else width
    array = indices.view(rows, -1).t().contiguous().numpy().astype(np.uint16 if width == 16 else np.uint8)
    places = graph.node("Cast", graph.constant(array, UNSIGNED[width], "indices"), to=ir.DataType.INT32)
    if tables > 1:
        below = torch.arange(rows, dtype=torch.int32) // (rows // tables) * size
        places = graph.node("Add", places, graph.constant(below[None], name="tables"))
    return graph.node("Gather", graph.constant(table.flatten(), name="centroids"), places, axis=0)


def with_bias(module: Packed, product: Any, graph: Graph) -> Any:
    """The product and the bias of a linear, where it has one."""
    if module.bias is None:
        return product
    return graph.node("Add", product, graph.constant(module.bias.float(), name="bias"))


Lowering = Callable[[Any, Any, Graph], Any]
LOWERINGS: dict[type, Lowering] = {
    IntegerLinear: integer_linear, CodebookLinear: codebook_linear, FloatLinear: float_linear, Rows: table_rows,
    TiedHead: tied_head,
}  # fmt: skip


def check_lowered(model: Any) -> None:
    """Raise ExportError where a placeholder is left."""
    left = [node for node in model.graph if node.domain == DOMAIN]
    if left:
        raise ExportError(f"{left[0].attributes['key'].as_string()}: has no nodes in the exported file")
