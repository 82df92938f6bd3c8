"""An exported file in its own runtime, called as the model that it was made of."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PAST_NAME, PRESENT_NAME = "past_key_values", "present"  # of keys and values that go in and come out
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
        if hasattr(found, "start_logits"):
            return torch.stack([found.start_logits, found.end_logits], -1)
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
        session = session_of(file)
        super().__init__([one.name for one in session.get_inputs()])
        self.session = session
        self.runtime = runtime_of_sessions()

    def logits(self, given: dict[str, Tensor]) -> Tensor:
        (found,) = self.session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})
        return torch.from_numpy(found)


class Writer(Runner, abc.ABC):
    """A runner that also writes texts, as a model of transformers does."""

    config: Any
    generation_config: Any

    @abc.abstractmethod
    def generate(self, **settings: Any) -> Tensor:
        """The tokens that transformers' own search finds."""


class TorchWriter(TorchRunner, Writer):
    """A model of transformers, as it is."""

    def __init__(self, model: Any, inputs: list[str], runtime: str) -> None:
        super().__init__(model, inputs, runtime)
        self.config, self.generation_config = model.config, model.generation_config

    def generate(self, **settings: Any) -> Tensor:
        found: Tensor = self.function[0].generate(**settings)
        return found


class OnnxWriter(Writer):
    """A decoder with a cache in ONNX Runtime, behind an encoder or alone; `folder` holds its settings."""

    def __init__(self, folder: Path, decoder: Path, encoder: Path | None = None) -> None:
        from transformers import AutoConfig, GenerationConfig

        session = session_of(decoder)
        shapes = {one.name: one.shape for one in session.get_inputs()}
        super().__init__(list(shapes))
        self.decoder = session
        self.encoder = None if encoder is None else session_of(encoder)
        self.past = {
            name: torch.zeros(1, shape[1], 0, shape[3])
            for name, shape in shapes.items() if name.startswith(PAST_NAME) and ".encoder." not in name
        }  # fmt: skip
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.runtime = runtime_of_sessions()

    def forward(self, **inputs: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits(inputs))

    def logits(self, given: dict[str, Tensor]) -> Tensor:
        return self.begin(given)(slice(None))

    def begin(self, given: dict[str, Tensor]) -> Callable[[slice], Tensor]:
        """A function that reads the next tokens of a text, and gives their logits."""
        mask = given["attention_mask"] if "attention_mask" in given else torch.ones_like(given["input_ids"])
        ids = given["input_ids" if self.encoder is None else "decoder_input_ids"]
        source = None if self.encoder is None else self.encode(given["input_ids"], mask)
        past: dict[str, Tensor] = {}

        def read(part: slice) -> Tensor:
            nonlocal past
            seen = mask if source is not None else mask[:, : part.stop]
            logits, past = self.step(ids[:, part], seen, past, source)
            return logits

        return read

    def encode(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Keys and values of a source, as the decoder takes them."""
        assert self.encoder is not None
        return run_session(self.encoder, {"input_ids": ids, "attention_mask": mask})

    def step(
        self, ids: Tensor, mask: Tensor, past: Mapping[str, Tensor], source: Mapping[str, Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Logits of `ids` (rows, tokens) behind what is `past`, and what is past then. `mask`: of the source, or of all
        tokens."""
        past = past or {name: empty.expand(len(ids), -1, -1, -1) for name, empty in self.past.items()}
        given = {"input_ids": ids, ("attention_mask" if source is None else "encoder_attention_mask"): mask}
        if "position_ids" in self.inputs:
            begin = next(iter(past.values())).shape[2]
            order = torch.arange(begin, begin + ids.shape[1]) if positions is None else positions
            given["position_ids"] = order.expand(len(ids), -1)
        found = run_session(self.decoder, {**given, **past, **(source or {})})
        return found.pop("logits"), found

    def generate(self, **settings: Any) -> Tensor:
        from niwaki.export.generation import Search

        search: Any = Search(self)
        found: Tensor = search.generate(**settings)
        return found


class StepByStep:
    """A writer that is handed the last tokens of each text one at a time."""

    def __init__(self, writer: OnnxWriter, last: int) -> None:
        self.writer = writer
        self.last = last

    def __call__(self, **inputs: Tensor) -> Any:
        length = inputs["decoder_input_ids" if self.writer.encoder is not None else "input_ids"].shape[1]
        first = max(length - self.last, 1)
        read = self.writer.begin(inputs)
        parts = [read(slice(0, first)), *(read(slice(place, place + 1)) for place in range(first, length))]
        return SimpleNamespace(logits=torch.cat(parts, 1))


def session_of(file: Path) -> Any:
    """A session of ONNX Runtime, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Threads that spin while they wait take the processor from whoever has the next turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), made_exact(options), providers=["CPUExecutionProvider"])


def made_exact(options: Any) -> Any:
    """The options of a session, with what lets it sum products of codes exactly where it would not by itself."""
    for key, value in ({} if sums_are_exact() else PRECISE).items():
        options.add_session_config_entry(key, value)
    return options


def runtime_of_sessions() -> str:
    """What runs a session."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def run_session(session: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a session gives, keys and values by the names under which the next call takes them."""
    found = session.run(None, {name: tensor.contiguous().numpy() for name, tensor in given.items()})
    names = (one.name.replace(PRESENT_NAME, PAST_NAME, 1) for one in session.get_outputs())
    return dict(zip(names, map(torch.from_numpy, found), strict=True))
