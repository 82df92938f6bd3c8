"""2:4 + LoRA + int8, exported: the same zeros and the same score in the chain, the artifact and the ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from niwaki import artifact, compose, pipeline, storage  # noqa: E402
from niwaki.export.onnx import FILE  # noqa: E402
from niwaki.export.runner import OnnxRunner  # noqa: E402
from niwaki.measure.evaluate import evaluate  # noqa: E402

METHODS = ["tuning=lora", "compression=[prune/magnitude,quantize/int8]", "compression.magnitude.pattern='2:4'"]


def answers(model: Any, corpus: Any) -> tuple[dict[str, float], Tensor]:
    """Scores and logits of the test split."""
    scores = evaluate(model, corpus.evaluation("test"), corpus.task, corpus.labels, corpus.tokenizer).compute()
    with torch.inference_mode():
        found = [model(**corpus.task.inputs(batch)).logits for batch in corpus.evaluation("test")]
    return scores, torch.cat(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[tuple[dict[str, float], Tensor]]]:
    """The folder of the run, its metrics, and what was answered before the merge, by the artifact and by the export."""
    folder = tmp_path_factory.mktemp("sparse")
    starts, path = ("a rose is", "the sky is", "grass grows", "violets are"), folder / "rows.jsonl"
    rows = [{"text": f"{starts[i % 4]} {i}", "label": "no" if i % 4 < 2 else "yes"} for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose.compose([
        *METHODS, "export=onnx", "data=files", *(f"data.{split}={path}" for split in ("train", "validation", "test")),
        "model=tiny-bert", "trainer.precision=fp32", "trainer.max_steps=80", "trainer.max_epochs=80",
        "optimizer.lr=0.005", "data.batch_size=16", "logger=none", "callbacks=[]", "measure=scores",
    ]).config  # fmt: skip
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:

        def judge(recipe: Any, before: Any = pipeline.judge) -> Any:
            seen["corpus"], empty = before(recipe)
            return seen["corpus"], empty

        def settle(recipe: Any, work: Any, before: Any = pipeline.settle) -> None:
            before(recipe, work)
            seen["chain"] = answers(work.model, seen["corpus"])

        patch.setattr(pipeline, "judge", judge)
        patch.setattr(pipeline, "settle", settle)
        metrics = pipeline.run(compose.build(config), folder, config)
    saved = artifact.load(folder / "model").model
    exported = OnnxRunner(folder / "exports" / "onnx" / FILE)
    return folder, metrics, [seen["chain"], answers(saved, seen["corpus"]), answers(exported, seen["corpus"])]


def test_the_score_is_one_before_the_merge_after_it_and_exported(run: Any) -> None:
    _, metrics, ((score, chain), *others) = run
    assert score["accuracy"] > 0.8  # it has learned something
    for found, logits in others:
        assert found["accuracy"] == score["accuracy"]
        assert found["loss"] == pytest.approx(score["loss"], abs=2e-3)
        off = (logits - chain).abs().amax(1) / chain.abs().max().clamp(min=1.0)
        assert float(off.median()) < 1e-5  # where no activation fell on the other side of a step
        assert float(off.max()) < 0.03
    assert metrics["after"]["test"] == pytest.approx(others[0][0])
    assert metrics["exports"]["onnx"]["test"] == pytest.approx(others[1][0])


def codes_in_the_artifact(folder: Path) -> dict[str, np.ndarray]:
    """By linear, (out, in), out of the file of the weights."""
    tensors = storage.read(artifact.weights_of(folder))
    return {name[: -len(".codes")]: codes.numpy() for name, codes in tensors.items() if name.endswith(".codes")}


def codes_in_the_export(path: Path) -> list[np.ndarray]:
    """(out, in), of every integer product of the graph, whose weights lie the other way round."""
    graph = onnx.load(path).graph
    tensors = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    return [tensors[node.input[1]].T for node in graph.node if node.op_type == "MatMulInteger"]


def test_both_files_hold_two_zeros_in_every_four(run: Any) -> None:
    folder, _, _ = run
    ours, theirs = codes_in_the_artifact(folder / "model"), codes_in_the_export(folder / "exports" / "onnx" / FILE)
    linears = json.loads((folder / "metrics.json").read_text())["targets"]
    assert set(ours) == set(linears)
    assert len(theirs) == len(ours) == 18
    for codes in (*ours.values(), *theirs):
        assert codes.dtype == np.int8
        zeros = (codes.reshape(len(codes), -1, 4) == 0).sum(2)
        assert zeros.min() >= 2
        assert zeros.mean() < 2.2  # and little else is zero
    assert sorted(codes.tobytes() for codes in ours.values()) == sorted(codes.tobytes() for codes in theirs)
