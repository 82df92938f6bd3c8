"""Every task on the data and the model that it runs on unless told otherwise: with each kind of tuning and compression
it works, from the first row to an answer of the artifact that can be read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from niwaki import artifact, compose, inference, pipeline
from niwaki.catalogue import config_folder

TASKS = sorted(path.stem for path in (config_folder() / "task").glob("*.yaml"))
TUNINGS = ("full", "lora", "adapter", "prefix")
COMPRESSIONS = (None, "prune/magnitude", "quantize/qat", "distill/logits")
WHOLE = os.environ.get("NIWAKI_GRID") == "whole"  # `make grid`; otherwise each tuning and each compression once or more
SOME = [("lora", "quantize/qat"), ("adapter", "prune/magnitude"), ("prefix", None)]
CELLS = [
    (tuning, one) for tuning in TUNINGS for one in COMPRESSIONS if WHOLE or tuning == "full" or (tuning, one) in SOME
]
SMALL = {  # so that rows stay short; else max_length=48
    "question_answering": ["task.max_length=64", "task.stride=16"],
    "code_generation": ["task.max_length=96", "task.max_target_length=8", "task.samples=1", "task.k=[1]"],
    "instruction": ["task.max_length=64", "task.max_target_length=8"],
    "dialogue": ["task.max_length=64", "task.max_target_length=8"],
    "summarization": ["task.max_length=64", "task.max_target_length=8"],
    "table_to_text": ["task.max_length=64", "task.max_target_length=8"],
    "translation": ["task.max_length=48", "task.max_target_length=8"],
    "causal_lm": ["task.max_length=48", "task.max_new_tokens=4"],
    "relation": ["task.max_length=128"],
}
MANY_LABELS = ("classification", "relation", "multi_label", "ner")  # of which each split has to hold some
GAPS = {"masked_lm": "a [MASK] tree", "span_corruption": "a <extra_id_0> tree"}


def settings_of(task: str, tuning: str, compression: str | None, teacher: Path | None) -> list[str]:
    small = SMALL.get(task, ["task.max_length=48"])
    chosen = [f"task={task}", f"tuning={tuning}", f"compression=[{compression or ''}]", *small]
    if compression == "distill/logits":
        chosen.append(f"compression.logits.teacher={teacher}")
    if compose.compose([f"task={task}"]).config["model"]["name"].startswith("package:"):
        chosen.append("model=tiny-bert")  # the same kind of model, and quick
    limit = f"data.limit={40 if task in MANY_LABELS else 8}"
    return [
        *chosen, limit, "data.batch_size=4", "data.eval_batch_size=8", "trainer.max_epochs=1",
        "trainer.max_steps=2", "trainer.precision=fp32", "trainer.limit_validation_batches=1", "optimizer.lr=1e-3",
        "measure=scores", "logger=none", "callbacks=[]",
    ]  # fmt: skip


def run(settings: list[str], folder: Path) -> dict[str, Any]:
    folder.mkdir()
    config = compose.compose(settings).config
    return pipeline.run(compose.build(config), folder, config)


def question(task: str) -> dict[str, Any]:
    """A row of the task's built-in data, without its answer."""
    recipe = compose.build(compose.compose([f"task={task}", "data.limit=4"]).config)
    needs = recipe.task.needs
    row = recipe.data.splits(needs, 0)["test"][0]
    asked = {name: row[name] for name in needs.asking.all if row.get(name) is not None}
    if task in GAPS:
        return {"text": GAPS[task]}
    return needs.asking.checked(asked or {"text": "a tree in the garden"})


@pytest.mark.parametrize("task", TASKS)
def test_a_task_goes_with_what_it_can(task: str, tmp_path: Path, subtests: Any) -> None:
    first: Path | None = None
    worked = 0
    for tuning, compression in CELLS:
        name = f"{tuning}+{(compression or 'none').replace('/', '.')}"
        with subtests.test(f"{task} x {name}"):
            settings = settings_of(task, tuning, compression, first)
            metrics = run(settings, tmp_path / name)
            assert all(math.isfinite(value) for value in metrics["after"]["test"].values())
            assert metrics["metric"] in metrics["after"]["test"]
            assert metrics["parity"] < 1e-4
            first = first or tmp_path / name / "model"
            worked += 1
    print(f"{task}: {worked} of {len(CELLS)} work")


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_can_be_read(task: str, tmp_path: Path) -> None:
    run(settings_of(task, "full", None, None), tmp_path / "run")
    saved = artifact.load(tmp_path / "run" / "model")
    row = question(task)
    (said,) = inference.answers(saved, [row], 4)
    assert {**said, **row} == said  # the question stands before what was found
    found = {name: value for name, value in said.items() if name not in row}
    assert found, f"{task} adds nothing to {row}"
    assert json.loads(json.dumps(found)) == found
