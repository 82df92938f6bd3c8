"""Artifacts of tiny models and single packed linears, for the tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from niwaki import artifact
from niwaki.compression.quantize.integers import IntegerLinear, to_codes
from niwaki.model.anatomy import adapt
from niwaki.stage import Phase
from niwaki.weights import fold

OUT, IN = 24, 48


def integers(
    bits: int, group: int | None, activation_bits: int | None, *, bias: bool = True, zeros: float = 0.3
) -> IntegerLinear:
    """A linear on a grid, some of its weights zero, its rows of very different sizes."""
    weight = torch.randn(OUT, IN) * torch.logspace(-1, 1, OUT)[:, None]
    weight[torch.rand(OUT, IN) < zeros] = 0.0
    linear = IntegerLinear(
        IN, OUT, bits=bits, group=group, activation_bits=activation_bits,
        bias=nn.Parameter(torch.randn(OUT)) if bias else None,
    )  # fmt: skip
    codes, scale = to_codes(weight.reshape(-1, group) if group else weight, bits)
    linear.store(codes.to(torch.int8).reshape(OUT, IN), scale.reshape(OUT, -1))
    return linear


def by_hand(linear: IntegerLinear, values: Tensor) -> Tensor:
    """((codes - zero) * scale) (factor * x) + bias, x rounded per token or by a scale that was measured before."""
    zero, factor, static = (getattr(linear, name, None) for name in ("zero", "factor", "input_scale"))
    values = values if factor is None else values * factor
    if linear.activation_bits and static is not None:
        last = 2 ** (linear.activation_bits - 1) - 1
        values = (values / static).round().clamp(-last, last) * static
    elif linear.activation_bits:
        codes, scale = to_codes(values, linear.activation_bits)
        values = codes * scale
    grouped = linear.integers().view(OUT, linear.scale.shape[1], -1).double()
    grouped = grouped if zero is None else grouped - zero[:, :, None]
    weight = (grouped * linear.scale[:, :, None]).view(OUT, IN)
    found = values.double() @ weight.t()
    return (found if linear.bias is None else found + linear.bias.detach()).float()


def widened(linear: IntegerLinear, *parts: str) -> IntegerLinear:
    """The linear with these parts: whole or real zeros, a factor of the input, one scale for all inputs."""
    shape = linear.scale.shape
    made = {
        "whole": ("zero", torch.randint(-3, 4, shape)), "real": ("zero", torch.randn(shape)),
        "factor": ("factor", torch.rand(IN) + 0.5), "input_scale": ("input_scale", torch.tensor(0.01)),
    }  # fmt: skip
    for part in parts:
        setattr(linear, *made[part])
    return linear


def lowered(linear: Any, opset: int = 21, kernels: str = "portable") -> Any:
    """A graph of this linear alone, in nodes of ONNX."""
    import onnx_ir as ir

    from niwaki.export import lowering

    value = ir.Value(name="x", shape=ir.Shape(["rows", "tokens", IN]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("niwaki", "Packed", [value], [ir.AttrString("key", "linear")], num_outputs=1)
    (out,) = node.outputs
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape(["rows", "tokens", OUT])
    graph = ir.Graph([value], [out], nodes=[node], opset_imports={"": opset, "niwaki": 1}, name="one")
    model = ir.Model(graph, ir_version=10)
    lowering.lower(model, {"linear": linear}, opset, kernels)
    lowering.check_lowered(model)
    return model


def answered(model: Any, values: Tensor, *, optimized: bool = True) -> list[np.ndarray[Any, Any]]:
    """All outputs of a graph."""
    import onnx_ir as ir
    import onnxruntime

    from niwaki.export.runner import made_exact

    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    made_exact(options)
    text = ir.serde.serialize_model(model).SerializeToString()
    found: list[Any] = onnxruntime.InferenceSession(text, options).run(None, {"x": values.numpy()})
    return found


def rows() -> Tensor:
    """Tokens of very different sizes, one of them nothing but zeros."""
    values = torch.randn(3, 5, IN) * torch.logspace(-2, 2, 15).view(3, 5, 1)
    values[1, 2] = 0.0
    return values


def saved(one: Any, folder: Path, *stages: Any, tuning: Any = None) -> artifact.Artifact:
    """The artifact of a model after these stages, without a fit; what a tuning adds is moved away from nothing."""
    base_config, edits = one.model.config.to_dict(), adapt(one.model)
    context = one.context()
    shaping = [stage for stage in stages if stage.phase <= Phase.SHAPE]
    for stage in shaping:
        edits += stage.prepare(one.model, context).edits
    if tuning:
        edits += tuning.grow(one.model, context.anatomy)
    context = one.context()
    if tuning:
        edits += tuning.prepare(one.model, context).edits
        for name, parameter in one.model.named_parameters():
            if any(part in name for part in (".lora_B.", ".prefix.", ".up.")):
                torch.nn.init.normal_(parameter, std=0.1)
    for stage in stages:
        if stage not in shaping:
            edits += stage.prepare(one.model, context).edits
    context.records.update(fold({**context.targets, **context.tables}))
    for stage in [*([tuning] if tuning else []), *stages]:
        edits += stage.finalize(one.model, context)
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits, store="auto",
    )  # fmt: skip
    return artifact.load(folder)
