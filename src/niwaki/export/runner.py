"""An exported file in its own runtime, called as the model that it was made of."""

from __future__ import annotations

import abc
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PRECISE = {"session.x64quantprecision": "1"}  # for CPUs without VNNI, which else clip sums; others it slows 2.4 times


class Runner(nn.Module, abc.ABC):
    """(input_ids, attention_mask, ...) -> an object with `logits`. It stands on the CPU."""

    runtime: str  # and its version

    def __init__(self, inputs: list[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # tells where inputs have to be

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.place.device

    @abc.abstractmethod
    def logits(self, given: dict[str, Tensor]) -> Tensor:
        """Of inputs by the names that the file has for them."""

    def forward(self, **inputs: Tensor) -> Any:
        given = {name: inputs[name] if name in inputs else missing(name, inputs) for name in self.inputs}
        return SimpleNamespace(logits=self.logits(given))


def missing(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """An input that a batch does not have: all is seen, and all is one text."""
    ids = inputs["input_ids"]
    return torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)


class TorchRunner(Runner):
    """A function of torch that takes inputs by name, or in their order, and gives logits, alone or in an object."""

    def __init__(self, function: Any, inputs: list[str], runtime: str, *, by_name: bool = True) -> None:
        super().__init__(inputs)
        self.function = [function]  # in a list: no part of this module
        self.by_name = by_name
        self.runtime = runtime

    def logits(self, given: dict[str, Tensor]) -> Tensor:
        found = self.function[0](**given) if self.by_name else self.function[0](*given.values())
        logits: Tensor = getattr(found, "logits", found)
        return logits


@cache
def sums_are_exact() -> bool:
    """Whether ONNX Runtime, as it comes, sums products of 8-bit codes exactly on this machine: asked of the largest."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, inner, out = 4, 64, 16
    codes, weight = np.full((rows, inner), 255, np.uint8), np.full((inner, out), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])], "sums",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, [rows, inner])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [rows, out])],
        [numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"codes": codes})
    return bool((sums == 255 * 127 * inner).all())


class OnnxRunner(Runner):
    """An ONNX file in ONNX Runtime, on as many threads as torch has."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin while they wait take the processor from whoever has the next turn.
        precise = {} if sums_are_exact() else PRECISE
        for key, value in {**precise, "session.intra_op.allow_spinning": "0"}.items():
            options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        super().__init__([one.name for one in session.get_inputs()])
        self.session = session
        self.runtime = f"onnxruntime {onnxruntime.__version__}"

    def logits(self, given: dict[str, Tensor]) -> Tensor:
        (found,) = self.session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
        return torch.from_numpy(found)
