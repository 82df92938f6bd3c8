"""Heads by their names, what a run without training rows is, and the lives of runs with each head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import begin, finish, recipe_of, train, write_rows

from niwaki.errors import ConfigError, DataError
from niwaki.pipeline import check_teachers, judge, run
from niwaki.task.classification import Classification
from niwaki.task.heads import head

NLI = "model.overrides={id2label:{0:neutral,1:contradiction,2:entailment}}"
WORDS = "task.verbalizer={red: r, green: g, blue: b}"
LIVES = [
    ("label_embedding", ["compression=[prune/magnitude,quantize/qat]"]),
    ("label_embedding", ["tuning=lora", "tuning.merge=false"]),
    ("contrastive", ["task.pairs=2", "compression=[prune/magnitude]"]),
    ("contrastive", ["task.pairs=2", "tuning=lora", "compression=[quantize/qat]"]),
    ("prompt", ["tuning=prefix"]),
    ("prompt", ["model=tiny-llama", "tuning=adapter"]),
    ("entailment", [NLI, "compression=[quantize/qat]"]),
]


@pytest.mark.parametrize(("name", "settings"), LIVES)
def test_each_lives(name: str, settings: list[str], tmp_path: Path) -> None:
    """Trained, resumed bit for bit, folded without an error, saved and reloaded the same."""
    path = write_rows(tmp_path)["classification"]
    recipe = recipe_of("classification", path, f"task.head={name}", "trainer=cpu", *settings)
    corpus, work = begin(recipe)
    start = {key: value.detach().clone() for key, value in work.model.named_parameters()}
    train(recipe, corpus, work, tmp_path)
    assert any(not torch.equal(value, start[key]) for key, value in work.model.named_parameters())
    finish(recipe, corpus, work, tmp_path)


EXPORTS = [
    ("entailment", [NLI, "export=[onnx]"]),
    ("label_embedding", ["export=[onnx]"]),
    ("in_context", ["model=tiny-llama", "trainer.max_epochs=0", WORDS, "export=[torch]"]),
]


@pytest.mark.parametrize(("name", "settings"), EXPORTS)
def test_each_is_exported(name: str, settings: list[str], recipe: Callable[..., Any], tmp_path: Path) -> None:
    """With a parity and scores of its own, which an export is refused without."""
    metrics = run(recipe(f"task.head={name}", *settings), tmp_path, {})
    (found,) = metrics["exports"].values()
    assert found["test"] == pytest.approx(metrics["after"]["test"], abs=1e-4)


def test_a_teacher_that_reads_another_form_is_refused(recipe: Callable[..., Any], tmp_path: Path) -> None:
    for name, words in (("label_embedding", []), ("prompt", [WORDS])):
        (tmp_path / name).mkdir()
        run(recipe(f"task.head={name}", *words), tmp_path / name, {})
        student = recipe("compression=[distill/logits]", f"compression.logits.teacher={tmp_path / name}")
        corpus, empty = judge(student)
        if name == "label_embedding":
            check_teachers(student, corpus, empty)  # reads the same
            continue
        with pytest.raises(ConfigError, match=r"reads texts in another form than the student's"):
            check_teachers(student, corpus, empty)


def test_every_head_is_named_after_its_file() -> None:
    assert head.names() == ["contrastive", "entailment", "in_context", "label_embedding", "linear", "prompt"]
    assert [Classification(head=name).chosen.name for name in head.names()] == head.names()
    assert all(head.kind_of(name).paper for name in head.names())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "label_embeding"}, r"task\.head='label_embeding': needs one of .*; did you mean label_embedding\?"),
        ({"head": "linear", "template": "{}"}, r"task\.template='\{\}': head=linear has no such setting"),
        ({"head": "contrastive", "label_smoothing": 0.1}, r"task\.label_smoothing=0\.1: task\.head=contrastive"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Classification(**settings)


def test_without_training_rows_labels_are_known_and_nothing_is_learned(begun: Callable[..., Any]) -> None:
    made, corpus, _ = begun("task.head=label_embedding", "data.shots=0")
    assert corpus.labels == ("blue", "green", "red")
    assert {name: len(rows) for name, rows in corpus.features.items()} == {"train": 0, "validation": 8, "test": 8}
    assert len(corpus.training()) == 0
    assert list(corpus.training()) == []
    assert not made.fits
    with pytest.raises(DataError, match=r"data\.shots=0: there are no training rows to calibrate on"):
        corpus.calibration(4)


def test_without_training_rows_a_new_linear_is_refused(recipe: Callable[..., Any], rows: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.shots=0: task\.head=linear needs training rows; .*label_embedding"):
        recipe("data.shots=0")
    with pytest.raises(ConfigError, match=r"data\.shots=-1: must be a whole number, 0 or more"):
        recipe("data.shots=-1")
    taught = recipe(
        "data.shots=0", f"data.unlabelled={rows}", "compression=[distill/logits]", "compression.logits.teacher=t"
    )
    assert taught.fits  # by what a teacher says of rows without a label


def test_what_needs_a_fit_is_refused_without_rows(recipe: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.shots=0: there is no fit to average over"):
        recipe("task.head=label_embedding", "data.shots=0", "callbacks=[ema]")


def test_features_of_another_form_are_cached_apart(begun: Callable[..., Any]) -> None:
    """The same tokenizer, the same rows; what the model reads differs."""
    masked = ["task.head=prompt", WORDS, "model=tiny-distilbert"]
    chosen = [], masked, ["task.head=prompt", WORDS, "model=tiny-llama"]
    plain, asked, hinted = (begun(*one)[1].features["test"]["input_ids"][:] for one in chosen)
    assert plain != asked != hinted
