"""ONNX: a graph that ONNX Runtime and others run, with our own integers in it (onnx.ai).

A linear on integers stays one: the input is rounded token by token as ours is, and its codes meet the weights' codes in
MatMulInteger, so the exported sums are the same integers. Codes without rounded inputs are dequantized in the graph, at
most 4 bits each in the file where they have 3 or 4; 2 bits need opset 25.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.export.export import Export, ExportError
from niwaki.export.graphs import Function, decoder, encoder_and_decoder, refuse_virtual, whole
from niwaki.export.runner import PRECISE, OnnxRunner, OnnxWriter, Runner
from niwaki.weights import packed

if TYPE_CHECKING:
    from niwaki.artifact import Artifact
    from niwaki.model.anatomy import Anatomy
    from niwaki.task.task import Task

FILE = "model.onnx"
ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
LARGEST = 2**31 - 2**20  # bytes of one protobuf file; what is larger has its weights beside it
OPSETS = (21, 25)  # that ours are written for: types of 4 bits, and of 2 bits
LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True, kw_only=True)
class Onnx(Export):
    """Codes and scales of the artifact, one for one, in operators of ONNX.

    `opset`: of the file, 21 or 25; null takes 21, and 25 where codes have 1 or 2 bits. `kernels`: `portable` uses
    ONNX's own operators; `onnxruntime` multiplies codes of 3 and 4 bits by MatMulNBits, which only ONNX Runtime has.
    `cache`: what writes texts takes and gives keys and values, so that each token is one short call; of other models
    there are none.
    """

    paper: ClassVar[str] = "ONNX, 2017, github.com/onnx/onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    extra: ClassVar[str] = "onnx"
    texts: ClassVar[bool] = True

    opset: int | None = None
    kernels: Literal["portable", "onnxruntime"] = "portable"
    cache: bool = True

    def __post_init__(self) -> None:
        if self.opset not in (None, *OPSETS):
            raise ConfigError(f"export.onnx.opset={self.opset}: needs null, 21 or 25")

    def check(self, task: Task, anatomy: Anatomy) -> None:
        super().check(task, anatomy)
        if task.writes and task.name != "causal_lm" and not self.cache:
            raise ConfigError(f"export.onnx.cache=false: task={task.name} goes by a decoder with a cache; needs true")
        model: Any = anatomy.model
        if self.writes(task) and not model.config.is_encoder_decoder:
            refuse_virtual(anatomy)

    def write(self, saved: Artifact, example: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        from niwaki import artifact
        from niwaki.export import lowering

        opset = self.opset or (OPSETS[1] if fewest_bits(saved.model) <= 2 else OPSETS[0])
        model = plain_attention(saved.model)
        functions = self.functions(saved.task, model, example)
        held = lowering.hold_out(model)
        lowering.to_plain(model)
        facts = {}
        for name, function in functions.items():
            graph = traced(model, function, opset)
            lowering.lower(graph, held, opset, self.kernels)
            lowering.check_lowered(graph)
            share_tables(graph.graph)
            keep_norms_apart(graph.graph)
            save(graph, folder / name)
            facts[name] = described(graph)
        if self.writes(saved.task):
            artifact.save_settings(model, saved.tokenizer, folder)
        return facts[FILE] if FILE in facts else {"opset": opset, "session": dict(PRECISE), "graphs": facts}

    def writes(self, task: Task) -> bool:
        """Whether what is exported has a cache."""
        return self.cache and task.writes

    def functions(self, task: Task, model: Any, example: Mapping[str, Tensor]) -> dict[str, Function]:
        """What is traced, by the files that it becomes."""
        if not self.writes(task):
            return {FILE: whole(model, example)}
        if not model.config.is_encoder_decoder:
            return {FILE: decoder(model)}
        return dict(zip((ENCODER, DECODER), encoder_and_decoder(model), strict=True))

    def runner(self, folder: Path) -> Runner:
        if (folder / DECODER).is_file():
            return OnnxWriter(folder, folder / DECODER, folder / ENCODER)
        return OnnxWriter(folder, folder / FILE) if (folder / "config.json").is_file() else OnnxRunner(folder / FILE)


def plain_attention(model: Any) -> Any:
    """The model with attention written out, which every family can be traced with, and in fewer nodes."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return model


def traced(model: Any, function: Function, opset: int) -> Any:
    """The graph of a function of a model, without what the exporter notes of our sources.

    Raises:
        ExportError: the exporter cannot follow the model.
    """
    try:
        with quiet_exporter(), torch.no_grad():
            program: Any = torch.onnx.export(
                function.module, function.given, dynamo=True, dynamic_shapes={"given": function.sizes},
                input_names=function.inputs, output_names=function.outputs, opset_version=opset, verbose=False,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"this {model.config.model_type} cannot be traced ({cause(error)})") from error
    graph = program.model
    for value, sizes in zip(graph.graph.inputs, function.sizes, strict=True):
        if any(isinstance(value.shape[place], int) for place in sizes):
            raise ExportError(f"this {model.config.model_type} can only be traced for one size of {value.name}")
    for thing in (graph, graph.graph, *graph.graph, *graph.graph.initializers.values(), *values_of(graph)):
        thing.metadata_props.clear()
        thing.doc_string = None
    return graph


def share_tables(graph: Any) -> None:
    """Where an output layer is tied to the embeddings, the exporter stores their table a second time, turned; turn the
    first one in the graph instead, which a runtime does once."""
    import onnx_ir as ir

    tables = [node.inputs[0] for node in graph if node.op_type == "Gather" and node.inputs[0].is_initializer()]
    for table in {value.name: value for value in tables}.values():
        if len(table.shape) != 2:
            continue
        rows = table.const_value.numpy()
        for other in list(graph.initializers.values()):
            held = other.const_value
            if other is table or tuple(held.shape) != rows.T.shape or other.is_graph_output():
                continue
            if (held.numpy() == rows.T).all():
                turned = ir.Node("", "Transpose", [table], [ir.AttrInt64s("perm", [1, 0])], num_outputs=1)
                turned.outputs[0].name = f"{table.name}.turned"
                graph.insert_before(graph[0], turned)
                ir.convenience.replace_all_uses_with(other, turned.outputs[0])
                del graph.initializers[other.name]


def keep_norms_apart(graph: Any) -> None:
    """Put a Sum where an Add enters a LayerNormalization: of these two ONNX Runtime makes a SkipLayerNormalization,
    which takes several times as long as both. A bias that is added just before joins the sum."""
    import onnx_ir as ir

    for norm in list(graph):
        added = norm.inputs[0].producer() if norm.op_type == "LayerNormalization" else None
        if added is None or added.op_type != "Add":
            continue
        terms = [term for value in added.inputs for term in biased(value)]
        total = ir.Node("", "Sum", terms, num_outputs=1)
        ir.convenience.replace_nodes_and_values(graph, added, [added], [total], added.outputs, total.outputs)


def biased(value: Any) -> list[Any]:
    """The product and the bias that a value is the sum of, where nothing else reads it; else the value alone."""
    node = value.producer()
    if node is None or node.op_type != "Add" or len(value.uses()) > 1 or value.is_graph_output():
        return [value]
    product = [one.producer() for one in node.inputs]
    plain = any(one is not None and one.op_type == "MatMul" for one in product)
    return list(node.inputs) if plain and any(one.is_initializer() for one in node.inputs) else [value]


def values_of(graph: Any) -> Iterator[Any]:
    """What flows between the nodes of a graph."""
    yield from graph.graph.inputs
    for node in graph.graph:
        yield from node.outputs


def cause(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Within: no notices of the exporter."""
    found = {name: logging.getLogger(name) for name in LOGGERS}
    levels = {name: logger.level for name, logger in found.items()}
    for logger in found.values():
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in found.items():
            logger.setLevel(levels[name])


def fewest_bits(model: nn.Module) -> int:
    """Of a stored weight; 32 where none is packed."""
    return min((module.bits for _, module in packed(model)), default=32)


def save(graph: Any, file: Path) -> None:
    """Write a graph; weights that one file cannot hold stand beside it."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    ir.save(graph, file, external_data=f"{file.name}.data" if size > LARGEST else None)


def described(graph: Any) -> dict[str, Any]:
    """What `export.json` says of a graph."""

    def shape(value: Any) -> dict[str, Any]:
        sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
        return {"name": value.name, "type": str(value.dtype).lower(), "shape": sizes}

    return {
        "opset": graph.opset_imports[""],
        "inputs": [shape(value) for value in graph.graph.inputs],
        "outputs": [shape(value) for value in graph.graph.outputs],
        "session": dict(PRECISE),
    }
