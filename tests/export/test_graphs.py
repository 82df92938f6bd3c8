"""A model that writes, as graphs with a cache: one call or many say the same, and so do the texts that are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import saved

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from niwaki import artifact  # noqa: E402
from niwaki.compression.quantize.int8 import Int8  # noqa: E402
from niwaki.compression.quantize.qat import QAT  # noqa: E402
from niwaki.errors import ConfigError  # noqa: E402
from niwaki.export.export import ExportError  # noqa: E402
from niwaki.export.exports import check_texts  # noqa: E402
from niwaki.export.hf import HuggingFace  # noqa: E402
from niwaki.export.onnx import DECODER, ENCODER, FILE, Onnx  # noqa: E402
from niwaki.export.onnx_int8 import OnnxInt8  # noqa: E402
from niwaki.export.runner import OnnxRunner, OnnxWriter, StepByStep  # noqa: E402
from niwaki.export.torch import TorchExport  # noqa: E402
from niwaki.model.anatomy import Anatomy  # noqa: E402
from niwaki.tuning.prompt import PromptTuning  # noqa: E402
from niwaki.weights import packed  # noqa: E402

CASES: dict[str, tuple[str, str, list[Any]]] = {
    "llama, 8 bits": ("llama", "causal_lm", [Int8()]),
    "gpt2": ("gpt2", "causal_lm", []),
    "bart, 8 bits": ("bart", "translation", [Int8()]),
    "t5, 4 bits": ("t5", "translation", [QAT(bits=4, group=16, activation_bits=None)]),
}


@pytest.fixture(params=CASES)
def written(request: Any, setting: Callable[..., Any], tmp_path: Path) -> tuple[Any, Any, Path]:
    """(setting, artifact, folder of the export) of a model of one block a stack, whose end never comes first."""
    family, task, stages = CASES[request.param]
    one = setting(family, task)
    Anatomy.of(one.model).keep_blocks([0])
    kept = saved(one, tmp_path / "model", *stages)
    (tmp_path / "onnx").mkdir()
    export = Onnx()
    export.check(one.task, one.context().anatomy)
    export.write(artifact.load(kept.folder), one.task.inputs(one.batch()), tmp_path / "onnx")
    return one, kept, tmp_path / "onnx"


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(ours.abs().max())))


def test_one_call_and_many_say_what_the_artifact_says(written: tuple[Any, Any, Path]) -> None:
    one, kept, folder = written
    runner = Onnx().runner(folder)
    assert isinstance(runner, OnnxWriter)
    batch = one.batch()
    with torch.inference_mode():
        for rows in (slice(None), slice(0, 1)):
            part = {name: tensor[rows] for name, tensor in batch.items()}
            inputs = one.task.inputs(part)
            ours = one.task.predictions(kept.model(**inputs), part)
            close(ours, one.task.predictions(runner(**inputs), part))
            for last in (1, 4, 99):
                close(ours, one.task.predictions(StepByStep(runner, last)(**inputs), part))

    if not kept.model.config.is_encoder_decoder:
        check_padding_before(kept.model, runner, batch)
    check_writes(one, kept.model, runner, batch)
    check_holds_once(one, kept, folder)


def check_writes(one: Any, model: Any, runner: Any, batch: dict[str, torch.Tensor]) -> None:
    """The same tokens as transformers finds with the model itself, greedily and by beams, 20 where none ends."""
    task = replace(one.task, **({"max_target_length": 20} if "decoder_input_ids" in batch else {"max_new_tokens": 8}))
    for settings in ({}, {"repetition_penalty": 1.3, "min_new_tokens": 6, "length_penalty": 0.5}):
        for holder in (model, runner):
            holder.generation_config.update(**settings)
        for beams in (1, 3):
            ours, theirs = (task.write(who, batch, num_beams=beams) for who in (model, runner))
            assert torch.equal(ours, theirs)
    assert (ours >= 0).sum(1).max() >= 6
    check_texts(model, runner, batch, task, 1e-4)


def check_padding_before(model: Any, runner: Any, batch: dict[str, torch.Tensor]) -> None:
    """Where rows of different lengths end together, a search tells where tokens stand, and the file heeds it."""
    ids = batch["input_ids"][:2, :6].clone()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"input_ids": ids, "attention_mask": mask, "do_sample": False, "max_new_tokens": 1}
    asked = {**settings, "output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        ours, theirs = (who.generate(**asked).logits[0] for who in (model, runner))
        first = model.generate(**{**asked, "attention_mask": None}).logits[0]
    close(ours, theirs)
    assert float((first - ours)[0].abs().max()) > 1e-3  # what is padded away matters


def check_holds_once(one: Any, kept: Any, folder: Path) -> None:
    """Names of the field, dimensions of any size, our codes one for one, and each linear in one file."""
    files = [folder / ENCODER, folder / DECODER] if kept.model.config.is_encoder_decoder else [folder / FILE]
    codes: list[str] = []
    for file in files:
        onnx.checker.check_model(file)
        graph = onnx.load(file).graph
        codes += [tensor.name for tensor in graph.initializer if tensor.name.endswith(".codes")]
        dims = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input
        }
        side = "decoder." if len(files) == 2 else ""
        if file.name == ENCODER:
            assert list(dims) == ["input_ids", "attention_mask"]
            assert [value.name for value in graph.output] == ["present.0.encoder.key", "present.0.encoder.value"]
            continue
        assert dims[f"past_key_values.0.{side}key"][::2] == ["batch", "past"]
        assert dims["input_ids"] == ["batch", "length"]
        names = ["logits", *(f"present.0.{side}{part}" for part in ("key", "value"))]
        assert [value.name for value in graph.output] == names
        assert ("position_ids" in dims) == (len(files) == 1)
    assert sorted(codes) == sorted(f"{name}.codes" for name, _ in packed(kept.model))


def test_a_text_that_goes_on_otherwise_is_refused(setting: Callable[..., Any]) -> None:
    """Unless the artifact itself finds both tokens as likely."""
    one, other = setting("llama", "causal_lm"), setting("llama", "causal_lm")
    with torch.no_grad():
        other.model.model.norm.weight.neg_()  # the least likely token is the likeliest
    batch = one.batch()
    check_texts(one.model, one.model, batch, one.task, 1e-4)
    with pytest.raises(
        ExportError, match=r"^it writes another text than the artifact, from token \d+ on, in one of \d"
    ):
        check_texts(one.model, other.model, batch, one.task, 1e-4)
    check_texts(one.model, other.model, batch, one.task, 9.0)


def test_without_a_cache_there_are_logits_alone(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("llama", "causal_lm")
    Anatomy.of(one.model).keep_blocks([0])
    kept = saved(one, tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    facts = Onnx(cache=False).write(artifact.load(kept.folder), one.task.inputs(one.batch()), tmp_path / "onnx")
    assert [value["name"] for value in facts["outputs"]] == ["logits"]
    assert isinstance(Onnx(cache=False).runner(tmp_path / "onnx"), OnnxRunner)


def test_what_cannot_be_is_refused_in_one_line(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("bart", "translation")
    anatomy = one.context().anatomy
    with pytest.raises(ConfigError, match=r"^export\.onnx\.cache=false: task=translation goes by .*; needs true$"):
        Onnx(cache=False).check(one.task, anatomy)
    for export in (OnnxInt8(), TorchExport()):
        with pytest.raises(ConfigError, match=r"^export=.*: task=translation writes texts by a decoder with a cache"):
            export.check(one.task, anatomy)
    HuggingFace().check(one.task, anatomy)

    one = setting("llama", "causal_lm")
    anatomy = one.context().anatomy
    PromptTuning(tokens=3).grow(one.model, anatomy)
    with pytest.raises(ConfigError, match=r"^export\.onnx\.cache=true: virtual tokens are read in .*; needs false$"):
        Onnx().check(one.task, anatomy)
    Onnx(cache=False).check(one.task, anatomy)
