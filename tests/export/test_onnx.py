"""An ONNX file says what its artifact says: every kind of model, any number of rows and tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import saved
from lifecycle import write_rows

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from niwaki import artifact, compose, inference, pipeline  # noqa: E402
from niwaki.compression.prune.heads import Heads  # noqa: E402
from niwaki.compression.prune.magnitude import Magnitude  # noqa: E402
from niwaki.compression.quantize.embeddings import Embeddings  # noqa: E402
from niwaki.compression.quantize.int8 import Int8  # noqa: E402
from niwaki.compression.quantize.qat import QAT  # noqa: E402
from niwaki.compression.share.codebook import CodebookSharing  # noqa: E402
from niwaki.compression.share.layers import Layers  # noqa: E402
from niwaki.errors import ConfigError  # noqa: E402
from niwaki.export import runner  # noqa: E402
from niwaki.export.export import FLIPPED, FLOAT_ORDER  # noqa: E402
from niwaki.export.onnx import FILE, Onnx  # noqa: E402
from niwaki.tuning.adapter import Houlsby  # noqa: E402
from niwaki.tuning.lora import LoRA  # noqa: E402
from niwaki.tuning.prefix import PrefixTuning  # noqa: E402
from niwaki.weights import packed  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that pruned, rounded to 8 bits, and exported."""
    folder = tmp_path_factory.mktemp("exported")
    path = write_rows(folder, count=36)["classification"]
    settings = [f"data.{split}={path}" for split in ("train", "validation", "test")]
    config = compose.compose([
        *settings, "data=files", "model=tiny-bert", "trainer.precision=fp32", "trainer.max_steps=30",
        "trainer.max_epochs=9", "optimizer.lr=0.01", "logger=none", "callbacks=[]", "measure.repeats=1",
        "measure.before=false", "compression=[prune/magnitude,quantize/int8]", "export=onnx",
    ]).config  # fmt: skip
    pipeline.run(compose.build(config), folder, config)
    return folder


def test_the_metrics_have_what_was_exported(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    found = metrics["exports"]["onnx"]
    assert found["test"] == pytest.approx(metrics["after"]["test"], abs=1e-3)
    assert found["bytes"] == (run / "exports" / "onnx" / FILE).stat().st_size
    assert found["parity"] <= found["bound"] == FLIPPED
    assert found["latency_ms"] > 0
    assert found["throughput"] > 0
    assert found["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    report = (run / "report.md").read_text()
    assert "## Exports" in report
    assert "| runtime | torch | onnxruntime" in report


def test_a_session_and_a_tokenizer_are_all_it_takes(run: Path) -> None:
    """What the README tells: nothing of niwaki is needed."""
    from transformers import AutoTokenizer

    folder = run / "exports" / "onnx"
    card = json.loads((folder / "export.json").read_text())
    session = onnxruntime.InferenceSession(folder / FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["a rose is red", "green grass grows here 7", "violet"]
    answers = inference.answers(artifact.load(run / "model"), [{"text": text} for text in texts], 1)
    expected = [one["label"] for one in answers]
    for text, label in zip(texts, expected, strict=True):
        words = tokenizer(text, return_tensors="np")
        (logits,) = session.run(None, {one["name"]: words[one["name"]] for one in card["inputs"]})
        assert card["labels"][logits[0].argmax()] == label


def test_the_file_holds_our_codes_and_nothing_of_this_machine(run: Path) -> None:
    saved_ = artifact.load(run / "model")
    file = run / "exports" / "onnx" / FILE
    graph = onnx.load(file).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    name = "model.bert.encoder.layer.0.intermediate.dense"
    codes = onnx.numpy_helper.to_array(held[f"{name.removeprefix('model.')}.codes"])
    ours = saved_.model.get_submodule(name.removeprefix("model.")).integers().numpy()
    assert np.array_equal(codes.T, ours)
    assert (codes == 0).mean() >= 0.5
    assert {node.op_type for node in graph.node} >= {"MatMulInteger", "Round"}
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(list(packed(saved_.model)))
    text = file.read_bytes()
    for word in (b"site-packages", b"stack_trace", b".py", b"/home", str(Path.cwd()).encode()):
        assert word not in text, word
    onnx.checker.check_model(file)


def test_the_card_has_the_checksum_of_every_file(run: Path) -> None:
    folder = run / "exports" / "onnx"
    card = json.loads((folder / "export.json").read_text())
    assert set(card["files"]) == {path.name for path in folder.iterdir()} - {"export.json"}
    for name, stamp in card["files"].items():
        assert artifact.stamp(folder / name) == stamp
    assert card["task"] == "classification"
    assert card["labels"] == ["a", "b", "c"]
    assert card["opset"] == 21
    assert card["inputs"][0] == {"name": "input_ids", "type": "int64", "shape": ["batch", "length"]}
    assert card["outputs"] == [{"name": "logits", "type": "float", "shape": ["batch", 3]}]


CASES: dict[str, tuple[str, str, list[Any], Any]] = {
    "ner": ("bert", "ner", [], None),
    "masked, 4 bits in groups": ("bert", "masked_lm", [QAT(bits=4, group=16, activation_bits=None)], None),
    "causal, 8 bits": ("llama", "causal_lm", [Int8()], None),
    "gpt2, 2 bits": ("gpt2", "causal_lm", [QAT(bits=2, group=None, activation_bits=None)], None),
    "t5": ("t5", "classification", [], None),
    "albert, shared values": ("albert", "classification", [Magnitude(sparsity=0.5), CodebookSharing(bits=3)], None),
    "heads of different numbers": ("bert", "classification", [Heads(keep=[1, 3, 2]), Int8()], None),
    "a block that runs twice": ("bert", "classification", [Layers(), QAT(bits=8, group=16)], None),
    "a prefix": ("bert", "classification", [], PrefixTuning(tokens=3)),
    "adapters": ("bert", "classification", [Int8()], Houlsby(size=4)),
    "lora beside": ("llama", "causal_lm", [], LoRA(rank=2, merge=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model(setting: Callable[..., Any], tmp_path: Path, case: str) -> None:
    family, task, stages, tuning = CASES[case]
    one = setting(family, task)
    kept = saved(one, tmp_path / "model", *stages, tuning=tuning)
    batch = one.task.inputs(one.batch())
    example = {name: tensor[:2].contiguous() for name, tensor in batch.items()}
    (tmp_path / "onnx").mkdir()
    export = Onnx()
    export.check(one.task, one.context().anatomy)
    export.write(artifact.load(kept.folder), example, tmp_path / "onnx")
    runner = export.runner(tmp_path / "onnx")
    bound = FLIPPED if any(getattr(s, "activation_bits", None) or isinstance(s, Int8) for s in stages) else FLOAT_ORDER
    assert export.bound(kept.model) == bound
    for inputs in (batch, {name: tensor[-1:] for name, tensor in batch.items()}, wider(batch)):
        ours, theirs = kept.model(**inputs).logits.detach(), runner(**inputs).logits
        assert ours.shape == theirs.shape
        seen = inputs["attention_mask"].bool() if ours.dim() == 3 else ...
        torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=1e-4 * max(1.0, float(ours.abs().max())))
    table = kept.model.get_input_embeddings().weight
    held = [t for t in onnx.load(tmp_path / "onnx" / FILE).graph.initializer if sorted(t.dims) == sorted(table.shape)]
    output = kept.model.get_output_embeddings()
    assert len(held) == (2 if output is not None and output.weight is not table else 1)


def wider(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Five rows, each three tokens longer at its end by padding."""
    rows = torch.arange(5) % len(batch["input_ids"])
    return {name: torch.nn.functional.pad(tensor[rows], (0, 3)) for name, tensor in batch.items()}


def test_norms_stay_apart_from_the_sums_before_them(setting: Callable[..., Any], tmp_path: Path) -> None:
    """Of an Add before a norm ONNX Runtime makes a node that is several times slower than both."""
    one = setting()
    kept = saved(one, tmp_path / "model")
    (tmp_path / "onnx").mkdir()
    Onnx().write(artifact.load(kept.folder), one.task.inputs(one.batch()), tmp_path / "onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "onnx" / FILE, options)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    blocks = len(one.context().anatomy.blocks)
    assert kinds.count("LayerNormalization") == 2 * blocks + 1
    assert "SkipLayerNormalization" not in kinds
    assert sum(node.op_type == "Sum" and len(node.input) == 3 for node in nodes) == 2 * blocks  # with the bias


def test_pairs_have_types_of_tokens(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    one.rows = {**one.rows, "text_pair": one.rows["text"][::-1]}
    kept = saved(one, tmp_path / "model")
    batch = one.task.inputs(one.batch())
    assert "token_type_ids" in batch
    (tmp_path / "onnx").mkdir()
    facts = Onnx().write(artifact.load(kept.folder), batch, tmp_path / "onnx")
    assert [one["name"] for one in facts["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    runner = Onnx().runner(tmp_path / "onnx")
    torch.testing.assert_close(runner(**batch).logits, kept.model(**batch).logits.detach(), rtol=0, atol=1e-6)
    alone = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    torch.testing.assert_close(runner(**alone).logits, kept.model(**alone).logits.detach(), rtol=0, atol=1e-6)


def test_an_opset_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"^export\.onnx\.opset=17: needs null, 21 or 25$"):
        Onnx(opset=17)


@pytest.mark.parametrize(
    ("family", "task", "bits", "group"),
    [
        ("llama", "causal_lm", 8, None), ("llama", "causal_lm", 4, 8), ("bert", "masked_lm", 2, None),
        ("bert", "classification", 5, None), ("bart", "causal_lm", 3, None), ("electra", "classification", 8, 4),
    ],
)  # fmt: skip
def test_integer_embeddings_are_looked_up_as_they_are_stored(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, bits: int, group: int | None
) -> None:
    """Narrow codes take half a byte or a quarter in the file, where a tied output layer reads the same ones."""
    one = setting(family, task)
    kept = saved(one, tmp_path / "model", Embeddings(bits=bits, group=group))
    batch = one.task.inputs(one.batch())
    (tmp_path / "onnx").mkdir()
    export = Onnx()
    export.write(artifact.load(kept.folder), batch, tmp_path / "onnx")
    ours, theirs = kept.model(**batch).logits.detach(), export.runner(tmp_path / "onnx")(**batch).logits
    seen = batch["attention_mask"].bool()
    off = (ours - theirs).abs()
    assert float((off if off.dim() == 2 else off[seen]).max()) < FLOAT_ORDER
    table = kept.model.get_input_embeddings().table
    held = {tensor.name: tensor for tensor in onnx.load(tmp_path / "onnx" / FILE).graph.initializer}
    codes = [array for name in held if name.endswith(".codes")
             if len(array := onnx.numpy_helper.to_array(held[name])) == table.out_features]  # fmt: skip
    assert len(codes) == 1
    width = {2: 2, 3: 4, 4: 4}.get(bits, 8)
    assert codes[0].nbytes == table.out_features * table.in_features * width // 8
    if width == 8:
        assert np.array_equal(codes[0], table.integers().numpy())
    if width == bits < 8:
        assert np.array_equal(codes[0].ravel(), table.codes.numpy())
    floats = [sorted(tensor.dims) for tensor in held.values() if tensor.data_type == 1]
    assert sorted((table.out_features, table.in_features)) not in floats


def test_a_cpu_that_clips_sums_is_told_not_to(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """The setting is for CPUs without VNNI alone: it slows the others down."""
    given: list[tuple[str, str]] = []
    add = onnxruntime.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        onnxruntime.SessionOptions, "add_session_config_entry",
        lambda options, key, value: (given.append((key, value)), add(options, key, value)),
    )  # fmt: skip
    for exact in (True, False):
        monkeypatch.setattr(runner, "sums_are_exact", lambda exact=exact: exact)
        given.clear()
        runner.OnnxRunner(run / "exports" / "onnx" / FILE)
        assert (("session.x64quantprecision", "1") in given) is not exact


def test_whether_sums_are_exact_is_asked_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clipping:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.session = session(*_, **__)

        def run(self, *given: Any) -> list[Any]:
            (sums,) = self.session.run(*given)
            assert sums.max() in (255 * 127 * 64, 32767 * 32)  # that is where it is clipped without VNNI
            return [np.minimum(sums, 32767 * 32)]

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", Clipping)
    assert runner.sums_are_exact.__wrapped__() is False
