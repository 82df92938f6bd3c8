"""The recipes of configs/experiment, run for a few steps from the teacher that each asks for to the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lifecycle import write_rows

from niwaki import artifact, compose, entry
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy

RECIPES = {  # terms of the loss; blocks that stay of the three
    "born_again": ({"distill/logits"}, 3),
    "distilbert": ({"distill/logits", "distill/cosine"}, 2),
    "minilm": ({"distill/minilm"}, 2),
    "pkd": ({"distill/logits", "distill/pkd"}, 2),
    "qad": ({"distill/logits"}, 3),
    "sparse_int8": ({"distill/logits", "distill/hidden"}, 3),
    "teacher_assistant": ({"distill/logits"}, 1),
    "tinybert_blocks": ({"distill/hidden", "distill/attention"}, 2),
}


def blocks_in(folder: Path) -> int:
    """The blocks of a run's artifact."""
    return len(list(Anatomy.of(artifact.load(folder / "model").model).named_blocks()))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(experiment, *overrides)`: its folder; `logs` stands in an empty folder."""
    file = write_rows(tmp_path)["classification"]
    monkeypatch.chdir(tmp_path)

    def carry_out(experiment: str, *overrides: str) -> Path:
        common = [f"+experiment={experiment}", "data=files"]
        common += [f"data.{split}={file}" for split in ("train", "validation", "test")]
        common += ["trainer.max_steps=4", "trainer.precision=fp32", "logger=none", "measure=scores", "callbacks=[]"]
        folder = tmp_path / experiment
        folder.mkdir()
        entry.run(compose.compose([*common, *overrides]).config, folder, False)
        return folder

    return carry_out


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_with_a_student_of_its_teacher(name: str, run: Any, tmp_path: Path) -> None:
    terms, blocks = RECIPES[name]
    more = ["compression.prune_layers.count=1"] if name == "teacher_assistant" else []
    folder = run(name, "model=tiny-bert", *more)
    assert blocks_in(folder) == blocks
    (teacher,) = [path for path in (tmp_path / "logs" / "teachers").iterdir() if path.is_dir()]
    assert blocks_in(teacher) == 3
    config = compose.build(compose.compose([f"+experiment={name}"]).config)
    assert {stage.name for stage in config.stages if stage.name.startswith("distill/")} == terms
    rows = json.loads((folder / "metrics.json").read_text())["targets"].values()
    assert {row["bits"] for row in rows} == ({8} if name in ("qad", "sparse_int8") else {32})
    assert {round(row["sparsity"], 2) >= 0.9 for row in rows} == {name == "sparse_int8"}


def test_the_second_step_of_tinybert_goes_on_from_the_first(run: Any, tmp_path: Path) -> None:
    first = run("tinybert_blocks", "model=tiny-bert")
    (teacher,) = [path for path in (tmp_path / "logs" / "teachers").iterdir() if path.is_dir()]
    second = run("tinybert_answers", f"model.name={first}/model", f"compression.logits.teacher={teacher}/model")
    assert blocks_in(second) == 2
    with pytest.raises(ConfigError, match=r"^model\.name"):
        compose.build(compose.compose(["+experiment=tinybert_answers"]).config)
