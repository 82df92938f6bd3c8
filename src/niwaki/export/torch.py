"""torch.export: a graph of torch's own operators, which torch runs without the model's code (Ansel et al. 2024)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.quantize.integers import IntegerLinear, largest_code
from niwaki.compression.quantize.kernels import PRODUCTS, IntegerProduct, is_exact, product_of
from niwaki.compression.quantize.tables import IntegerEmbedding, IntegerTable, OfTable
from niwaki.console import notice
from niwaki.errors import ConfigError
from niwaki.export.export import Export, ExportError
from niwaki.export.graphs import whole
from niwaki.export.onnx import cause, plain_attention, quiet_exporter
from niwaki.export.runner import Runner, TorchRunner
from niwaki.weights import packed, replace_everywhere

if TYPE_CHECKING:
    from niwaki.artifact import Artifact
    from niwaki.model.anatomy import Anatomy
    from niwaki.task.task import Task

FILE = "model.pt2"
LIBRARY = "compiled.pt2"
COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True, kw_only=True)
class TorchExport(Export):
    """An ExportedProgram for any number of rows and tokens, or with `compile` a shared library of it by AOTInductor.

    The file has the products of the machine that writes it: where linears run on `torch._int_mm` here
    (`integer_products` in `export.json`) so do those of the file, which needs a CPU whose sums are exact and fast;
    elsewhere they are exact sums of floats, on other CPUs too. Codes become floats in each call.
    """

    paper: ClassVar[str] = "Ansel et al. 2024, doi:10.1145/3620665.3640366"

    compile: bool = False

    def check(self, task: Task, anatomy: Anatomy) -> None:
        super().check(task, anatomy)
        if self.compile and not any(map(shutil.which, COMPILERS)):
            raise ConfigError(
                f"export.torch.compile=true: needs a C++ compiler ({', '.join(COMPILERS)}); none is found"
            )

    def write(self, saved: Artifact, example: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        model = plain_attention(saved.model)
        for module in list(model.modules()):
            if isinstance(module, IntegerLinear):
                replace_everywhere(model, module, TracedIntegers(module))
        trace_tables(model)
        for name, module in list(packed(model)):
            if not module.rounds_inputs:  # those of 8-bit floats that do are of operators of torch alone
                module.put_dense(model, name)
        program = exported(model, example)
        if self.compile:
            with quiet_exporter():
                torch._inductor.aoti_compile_and_package(program, package_path=str(folder / LIBRARY))
        else:
            torch.export.save(program, folder / FILE)
        integers = any(isinstance(module, TracedIntegers) and module.integers for module in model.modules())
        return {"inputs": list(example), "torch": torch.__version__, "integer_products": integers}

    def runner(self, folder: Path) -> Runner:
        card = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if card["integer_products"] and not is_exact(PRODUCTS["cpu"]):
            raise ExportError(
                "its products are those of integers by torch._int_mm, whose sums are not exact on this CPU; needs a "
                "file that was exported here"
            )
        if card["integer_products"] and product_of("cpu") is not PRODUCTS["cpu"]:
            notice("its products of integers by torch._int_mm are slow on this CPU; a file exported here has others")
        if self.compile:
            compiled = torch._inductor.aoti_load_package(str(folder / LIBRARY))
            return TorchRunner(compiled, card["inputs"], f"AOTInductor {torch.__version__}", by_name=False)
        program = torch.export.load(folder / FILE).module()
        return TorchRunner(program, card["inputs"], f"torch.export {torch.__version__}", by_name=False)


def exported(model: Any, example: Mapping[str, Tensor]) -> Any:
    """The program of a model, without notes of our sources.

    Raises:
        ExportError: torch cannot follow the model.
    """
    function = whole(model, example)
    # Sizes that it cannot prove to fit, of a text behind demonstrations, are left to be checked when the program runs.
    run = partial(torch.export.export, function.module, function.given, dynamic_shapes={"given": function.sizes})
    try:
        with quiet_exporter(), torch.no_grad():
            try:
                program = run()
            except torch._dynamo.exc.UserError:
                program = run(prefer_deferred_runtime_asserts_over_guards=True)
    except (RuntimeError, ValueError, torch._dynamo.exc.UserError) as error:
        raise ExportError(f"this {model.config.model_type} cannot be traced ({cause(error)})") from error
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


class TracedIntegers(nn.Module):
    """What IntegerLinear computes, of buffers alone: codes as int8, (in, out) where their sums are taken."""

    weight = None  # T5 asks for the type of a linear's weight, where it has one
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    factor: Tensor | None
    input_scale: Tensor | None

    def __init__(self, module: IntegerLinear | IntegerTable, bias: Tensor | None = None) -> None:
        super().__init__()
        self.activation_bits = getattr(module, "activation_bits", None)
        self.product = getattr(module, "integer_product", None)
        self.integers = isinstance(self.product, IntegerProduct)
        codes = module.integers()
        self.register_buffer("codes", codes.t().contiguous() if self.product else codes.contiguous())
        self.register_buffer("scale", module.scale.float())
        for name in ("zero", "factor", "input_scale"):
            found = getattr(module, name, None)
            self.register_buffer(name, None if found is None else found.float())
        self.bias = module.bias if bias is None else bias

    def forward(self, values: Tensor) -> Tensor:
        values = values if self.factor is None else values * self.factor
        if not self.activation_bits:
            return functional.linear(values, self.dequantized(), self.bias)
        codes, scale = self.rounded(values, largest_code(self.activation_bits))
        if not self.product:
            return functional.linear(codes * scale, self.dequantized(), self.bias)
        flat = codes.flatten(0, -2)
        if self.integers:
            sums = torch._int_mm(flat.to(torch.int8), self.codes)
        else:
            sums = self.product(flat, self.codes.float(), self.codes.shape[1])
        product = sums.float().unflatten(0, values.shape[:-1])
        product = product * scale * self.scale[:, 0]
        return product if self.bias is None else product + self.bias

    def rounded(self, values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        """Codes (floats) and scale of the input: drawn from each token, or the one that was measured before."""
        if self.input_scale is not None:
            return (values / self.input_scale).round().clamp(-largest, largest), self.input_scale
        scale = values.abs().amax(-1, keepdim=True) / largest
        scale = torch.where(scale > 0, scale, 1.0)
        return (values / scale).round(), scale

    def dequantized(self) -> Tensor:
        """(codes - zero) * scale, (out, in)."""
        grouped = self.codes.unflatten(1, (self.scale.shape[1], -1)).float()
        grouped = grouped if self.zero is None else grouped - self.zero[:, :, None]
        return (grouped * self.scale[:, :, None]).flatten(1)


class TracedRows(nn.Module):
    """What IntegerEmbedding computes, of the codes and scales of its table."""

    def __init__(self, table: TracedIntegers, factor: float | None) -> None:
        super().__init__()
        self.table = table
        self.factor = factor

    def forward(self, tokens: Tensor) -> Tensor:
        codes, scale = self.table.codes[tokens], self.table.scale[tokens]
        rows = (codes.unflatten(-1, (scale.shape[-1], -1)).float() * scale[..., None]).flatten(-2)
        return rows if self.factor is None else rows * self.factor


def trace_tables(model: nn.Module) -> None:
    """Put what can be traced where integer tables are read; each is there once."""
    readers = [module for module in model.modules() if isinstance(module, OfTable)]
    traced = {module.table: TracedIntegers(module.table) for module in readers}
    for module in readers:
        table = traced[module.table]
        if isinstance(module, IntegerEmbedding):
            replace_everywhere(model, module, TracedRows(table, module.factor))
            continue
        product = TracedIntegers(module.table, getattr(module, "bias", None))
        product.codes, product.scale = table.codes, table.scale
        replace_everywhere(model, module, product)
