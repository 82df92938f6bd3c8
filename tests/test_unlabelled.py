"""What is learned of rows without an answer: nothing by the task's own loss, and what the teacher says of them by the
terms of distillation; also in whole fits, that are stopped, and with remembered answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import begin, live, recipe_of, write_rows, write_teachers

from niwaki.compression.distill.logits import Logits, softened_divergence
from niwaki.fit import fit
from niwaki.model.teacher import Teacher

FIELD = {"classification": "label", "ner": "tags"}
TASKS = ["classification", "ner"]
KEPT = {"classification": [1, 4, 6], "ner": [0, 2]}  # rows that keep their answer


def partly(one: Any, kept: list[int]) -> dict[str, Any]:
    """The rows of a setting, of which only some have an answer."""
    field = FIELD[one.task.name]
    answers = [answer if row in kept else None for row, answer in enumerate(one.rows[field])]
    return {**one.rows, field: answers}


def chosen(one: Any, kept: list[int]) -> dict[str, Any]:
    """Those rows alone."""
    return {name: [column[row] for row in kept] for name, column in one.rows.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("task", TASKS)
def test_the_task_s_loss_is_that_of_the_labelled_rows(setting: Callable[..., Any], task: str, smoothing: float) -> None:
    one = setting("bert", task)
    kept = KEPT[task]
    batch = one.batch(partly(one, kept))
    logits = one.model(**one.task.inputs(batch)).logits
    classes, losses = logits.shape[-1], []
    full = one.batch()["labels"]
    for row in kept:
        for place in [()] if task == "classification" else [(t,) for t in range(logits.shape[1])]:
            label = int(full[(row, *place)])
            if label != -100:
                logs = logits[(row, *place)].log_softmax(-1)
                losses.append(-(1 - smoothing) * logs[label] - smoothing * logs.sum() / classes)
    expected = torch.stack(losses).mean()
    value = one.task.loss(one.model(**one.task.inputs(batch)), batch, smoothing=smoothing)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    alone = one.batch(chosen(one, kept))
    apart = one.task.loss(one.model(**one.task.inputs(alone)), alone, smoothing=smoothing)
    assert value.item() == pytest.approx(apart.item(), rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("task", TASKS)
def test_a_batch_without_any_label_adds_nothing(setting: Callable[..., Any], task: str, smoothing: float) -> None:
    one = setting("bert", task)
    batch = one.batch(partly(one, []))
    value = one.task.loss(one.model(**one.task.inputs(batch)), batch, smoothing=smoothing)
    assert value.item() == 0
    value.backward()
    gradients = [p.grad for p in one.model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_s_term_is_that_of_all_rows(setting: Callable[..., Any], task: str, cached: bool) -> None:
    one, other = setting("bert", task), setting("bert", task, seed=1)
    whole = one.numbered()
    one.rows = partly(one, KEPT[task])
    stage = Logits(teacher="there", temperature=3.0, cache=cached)
    context = one.context(load_teacher=lambda *_: Teacher(other.model))
    term = stage.prepare(one.model, context).terms["distill/logits"]
    batch = one.numbered()
    assert int((batch["labels"] == -1).sum()) > 0
    student, teacher = one.logits(), other.logits()
    if task == "ner":
        student, teacher = student[whole["labels"] != -100], teacher[whole["labels"] != -100]
    value = term(one.model(**one.task.inputs(batch)), batch)
    assert value.item() == pytest.approx(softened_divergence(student, teacher, 3.0).item(), rel=1e-4)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Labelled rows of each task; beside them `<task>.bare.jsonl`, other rows without an answer."""
    found = write_rows(tmp_path)
    (tmp_path / "classification.bare.jsonl").write_text(
        "".join(json.dumps({"text": f"violet roses {i}"}) + "\n" for i in range(30))
    )
    (tmp_path / "ner.bare.jsonl").write_text(
        "".join(json.dumps({"tokens": ["violet", "roses", str(i)]}) + "\n" for i in range(30))
    )
    return found


def taught(task: str, files: dict[str, str], folder: Path, *settings: str) -> list[str]:
    bare = files[task].replace(".jsonl", ".bare.jsonl")
    teachers = folder / "teachers"
    teacher = teachers / task if teachers.is_dir() else write_teachers(files, teachers, larger=True)[task]
    return [f"data.unlabelled={bare}", "compression=distill/logits", f"compression.logits.teacher={teacher}", *settings]


@pytest.mark.parametrize("task", TASKS)
def test_remembered_answers_are_the_same(tmp_path: Path, files: dict[str, str], task: str) -> None:
    ends = []
    for number, cached in enumerate(("false", "true", "true")):
        chosen = taught(task, files, tmp_path, f"compression.logits.cache={cached}", "data.batch_size=2")
        recipe = recipe_of(task, files[task], *chosen, "trainer.max_steps=20", checkpoints=False)
        corpus, work = begin(recipe)
        assert corpus.unlabelled == 30
        (tmp_path / str(number)).mkdir()
        fit(recipe, corpus, work, tmp_path / str(number), {}, resume=False)
        ends.append(work.model.state_dict())
    assert all(torch.allclose(ends[1][name], value, atol=1e-4) for name, value in ends[0].items())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[2].items())
    assert all(bool(torch.isfinite(value).all()) for value in ends[0].values())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("compression", ["", "prune/taylor", "prune/heads"])
def test_a_run_lives_through_its_whole_life(tmp_path: Path, files: dict[str, str], task: str, compression: str) -> None:
    """Stopped and gone on with as well, bit for bit."""
    chosen = taught(task, files, tmp_path, f"compression=[distill/logits{',' * bool(compression)}{compression}]")
    run = tmp_path / "run"
    run.mkdir()
    assert (live(recipe_of(task, files[task], *chosen), run) / "niwaki.json").is_file()
