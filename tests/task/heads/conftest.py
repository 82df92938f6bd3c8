"""A tiny model with a head by its name, and the corpus that it came with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niwaki import compose
from niwaki.pipeline import judge

ROWS = [
    ("a rose is red", "red"), ("the sky is blue", "blue"), ("red apples, red cherries and a long red wall", "red"),
    ("blue sea", "blue"), ("leaves of green grass", "green"), ("green", "green"), ("so blue", "blue"), ("red", "red"),
]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A file of eight rows of three classes."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
    return str(path)


@pytest.fixture
def recipe(rows: str) -> Callable[..., Any]:
    """`recipe(*overrides)`: a short run on the rows, tiny-bert unless told otherwise."""

    def make(*overrides: str) -> Any:
        common = [
            "model=tiny-bert",
            "data=files",
            *(f"data.{split}={rows}" for split in ("train", "validation", "test")),
        ]
        common += ["trainer=debug", "logger=none", "measure=scores", "callbacks=[checkpoint]", "task.max_length=48"]
        line = compose.parse([*common, "data.batch_size=4", *overrides])
        return compose.build(compose.compose(line.overrides).config)

    return make


@pytest.fixture
def begun(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """`begun(*overrides)`: (recipe, corpus, model) right before a fit."""

    def make(*overrides: str) -> Any:
        made = recipe(*overrides)
        corpus, _ = judge(made)
        model = made.model.load(made.task, corpus.labels, made.seed)
        made.task.begin(model, corpus)
        return made, corpus, model.eval()

    return make
