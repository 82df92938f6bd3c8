"""The recipes of configs/experiment, run for a few steps from the teacher that each asks for to the artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lifecycle import write_rows

from niwaki import artifact, compose, entry
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import Pretrained
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification

RECIPES = {  # weight of the task and of each term; blocks that stay of the three
    "born_again": (1.0, {"logits": 1.0}, 3),
    "distilbert": (2.0, {"logits": 5.0, "cosine": 1.0}, 2),
    "distilbert_general": (2.0, {"logits": 5.0, "cosine": 1.0}, 2),
    "minilm": (1.0, {"minilm": 1.0}, 2),
    "minilm_general": (0.0, {"minilm": 1.0}, 2),
    "pkd": (0.5, {"logits": 0.5, "pkd": 0.26}, 2),
    "qad": (1.0, {"logits": 1.0}, 3),
    "sparse_int8": (1.0, {"logits": 1.0, "hidden": 1.0}, 3),
    "teacher_assistant": (1.0, {"logits": 1.0}, 2),
    "tinybert_blocks": (0.0, {"hidden": 1.0, "attention": 1.0}, 2),
    "tinybert_general": (0.0, {"hidden": 1.0, "attention": 1.0}, 2),
}
TEMPERATURES = {"born_again": 1.0, "pkd": 10.0}  # others: 2


def blocks_in(folder: Path) -> int:
    """The blocks of a run's artifact."""
    return len(list(Anatomy.of(artifact.load(folder / "model").model).named_blocks()))


def teacher_of(place: Path) -> Path:
    """The folder of the one that was tuned first."""
    (folder,) = [path for path in (place / "logs" / "teachers").iterdir() if path.is_dir()]
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(experiment, *overrides)`: its folder; `logs` stands in an empty folder. Without an experiment: `run("")`."""
    file = write_rows(tmp_path)["classification"]
    monkeypatch.chdir(tmp_path)

    def carry_out(experiment: str, *overrides: str) -> Path:
        common = [*([f"+experiment={experiment}"] if experiment else []), "data=files"]
        common += [f"data.{split}={file}" for split in ("train", "validation", "test")]
        common += ["trainer.max_steps=4", "trainer.precision=fp32", "logger=none", "measure=scores"]
        folder = tmp_path / f"{experiment}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        entry.run(compose.compose([*common, *overrides]).config, folder, False)
        return folder

    return carry_out


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_with_a_student_of_its_teacher(name: str, run: Any, tmp_path: Path) -> None:
    task_weight, terms, blocks = RECIPES[name]
    more = ["compression.prune_layers.count=2"] if name == "teacher_assistant" else []
    folder = run(name, "model=tiny-bert", *more)
    assert blocks_in(folder) == blocks
    assert blocks_in(teacher_of(tmp_path)) == 3
    config = yaml.safe_load((folder / "config.yaml").read_text())
    methods = {key: one for key, one in config["compression"].items() if "teacher" in one}
    assert config["task_weight"] == task_weight
    assert {key: one["weight"] for key, one in methods.items()} == terms
    if "logits" in terms:
        assert methods["logits"]["temperature"] == TEMPERATURES.get(name, 2.0)
    rows = json.loads((folder / "metrics.json").read_text())["targets"].values()
    assert {row["bits"] for row in rows} == ({8} if name in ("qad", "sparse_int8") else {32})
    assert {round(row["sparsity"], 2) >= 0.9 for row in rows} == {name == "sparse_int8"}


def test_which_blocks_stay_is_what_the_paper_says(run: Any) -> None:
    kept = {}
    for name in ("pkd", "distilbert"):
        card = json.loads((run(name, "model=tiny-bert") / "model" / "niwaki.json").read_text())
        (kept[name],) = [edit["blocks"] for edit in card["edits"] if "blocks" in edit]
    assert kept == {"pkd": [0, 1], "distilbert": [0, 2]}


def test_the_second_step_of_tinybert_goes_on_from_the_first(run: Any, tmp_path: Path) -> None:
    first = run("tinybert_blocks", "model=tiny-bert", "trainer.max_epochs=2", "trainer.max_steps=null")
    assert not (first / "checkpoints" / "best.ckpt").exists()  # its head is random: no score tells
    teacher = teacher_of(tmp_path)
    second = run("tinybert_answers", f"model.name={first}/model", f"compression.logits.teacher={teacher}/model")
    assert blocks_in(second) == 2
    with pytest.raises(ConfigError, match=r"^model\.name"):
        compose.build(compose.compose(["+experiment=tinybert_answers"]).config)


def test_a_general_student_is_tuned_for_a_task(run: Any) -> None:
    """From raw text to an artifact, and from there, with a fresh head, to a classifier."""
    student = run("distilbert_general", "model=tiny-bert", "optimizer.lr=1e-2")
    card = json.loads((student / "model" / "niwaki.json").read_text())
    assert [edit["blocks"] for edit in card["edits"] if "blocks" in edit] == [[0, 2]]
    general = artifact.load(student / "model").model.base_model.state_dict()
    spec, task = Pretrained(name=str(student)), Classification(lr=1e-4)
    start = spec.load(task, ("a", "b", "c"), 0)
    assert start.head_is_new
    bare = {name: tensor for name, tensor in start.base_model.state_dict().items() if not name.startswith("pooler.")}
    assert bare.keys() == general.keys()
    assert all(torch.equal(bare[name], general[name]) for name in bare)
    plain = Tiny(name="bert").load(task, ("a", "b", "c"), 0).base_model.state_dict()
    assert not torch.equal(plain["encoder.layer.0.output.dense.weight"], bare["encoder.layer.0.output.dense.weight"])
    tuned = run("", "model=pretrained", f"model.name={student}", "optimizer.lr=1e-2")
    assert blocks_in(tuned) == 2
    saved = artifact.load(tuned / "model")
    assert (saved.task, saved.labels) == (task, ("a", "b", "c"))
    assert not torch.equal(saved.model.classifier.weight, start.classifier.weight)


def test_tinybert_from_raw_text_to_a_task(run: Any, tmp_path: Path) -> None:
    """A general student keeps its blocks in both steps on the task, whose teacher is a large model tuned there."""
    student = run("tinybert_general", "model=tiny-bert")
    teacher = run("", "model=tiny-bert")
    first = run("tinybert_task", f"model.name={student}/model", f"compression.hidden.teacher={teacher}/model")
    assert not (first / "checkpoints" / "best.ckpt").exists()
    second = run("tinybert_answers", f"model.name={first}/model", f"compression.logits.teacher={teacher}/model")
    assert [blocks_in(folder) for folder in (student, teacher, first, second)] == [2, 3, 2, 2]
    with pytest.raises(ConfigError, match=r"^compression\.attention\.teacher: needs a hub name"):
        run("tinybert_task", f"model.name={student}/model")


def test_several_teachers_are_named(run: Any) -> None:
    teachers = [run("", "model=tiny-bert", f"seed={seed}") / "model" for seed in (0, 1)]
    named = [f"compression.logits.teacher={teachers[0]}", f"compression.logits.more_teachers=[{teachers[1]}]"]
    student = run("multi_teacher", "model=tiny-bert", *named, "compression.logits.teacher_weights=[2,1]")
    assert blocks_in(student) == 2
    with pytest.raises(
        ConfigError, match=r"^compression\.logits\.more_teachers=\[\]: needs null or a list of hub names"
    ):
        run("multi_teacher", "model=tiny-bert", named[0])


def test_an_assistant_teaches_the_next(run: Any, tmp_path: Path) -> None:
    assistant = run("teacher_assistant", "model=tiny-bert", "compression.prune_layers.count=2")
    place = f"compression.logits.teacher={assistant}/model"
    assert blocks_in(run("teacher_assistant", "model=tiny-bert", "compression.prune_layers.count=1", place)) == 1


def test_all_generations_teach_together(run: Any, tmp_path: Path) -> None:
    """One tuned first, two that are named, a term beside them, and a vocabulary that loses tokens."""
    first = run("born_again", "model=tiny-bert")
    second = run("born_again", "model=tiny-bert", f"compression.logits.teacher={first}/model", "seed=1")
    more = f"compression.logits.more_teachers=[{first}/model,{second}/model]"
    chosen = "compression=[distill/logits,distill/hidden,prune/vocabulary]"
    for precision in ("fp32", "int8"):
        setting = [more, chosen, f"compression.logits.precision={precision}", "compression.vocabulary.alphabet=false"]
        metrics = json.loads((run("born_again", "model=tiny-bert", *setting) / "metrics.json").read_text())
        assert metrics["parity"] == 0.0
    assert len([path for path in (tmp_path / "logs" / "teachers").iterdir() if path.is_dir()]) == 1


def test_a_wrong_name_among_more_teachers_is_told_before_one_is_tuned(run: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^compression\.logits\.more_teachers\[0\]='typo/x/y': there is no such folder"
    ):
        run("born_again", "model=tiny-bert", "compression.logits.more_teachers=[typo/x/y]")
    assert not (tmp_path / "logs").exists()
