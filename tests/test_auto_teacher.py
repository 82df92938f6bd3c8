"""A teacher that is tuned first: what its run is, that it is made once, and not for a student that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lifecycle import write_rows

from niwaki import auto_teacher, compose, entry
from niwaki.errors import ConfigError


@pytest.fixture
def config_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`config_of(*overrides)`: the config of a short run; `logs` stands in an empty folder."""
    file = write_rows(tmp_path)["classification"]
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str) -> dict[str, Any]:
        common = ["model=tiny-bert", "data=files"]
        common += [f"data.{split}={file}" for split in ("train", "validation", "test")]
        common += ["trainer.max_steps=2", "trainer.precision=fp32", "logger=none", "measure=scores", "callbacks=[]"]
        return compose.compose([*common, *overrides]).config

    return make


def write_config(folder: Path, config: Any) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))


def key(config: Any) -> str:
    return auto_teacher.key_of(auto_teacher.of_teacher(config))


STUDENT = ["compression=[distill/logits,prune/magnitude]", "compression.logits.teacher=auto", "task_weight=0.5"]


def test_the_teacher_is_the_whole_model_tuned_alike(config_of: Any) -> None:
    teacher = auto_teacher.of_teacher(config_of(*STUDENT, "model.layers=[0,2]", "tuning=lora", "seed=3"))
    assert (teacher["model"]["layers"], teacher["compression"], teacher["task_weight"]) == (None, {}, 1.0)
    assert teacher["tuning"]["_target_"].endswith("LoRA")
    assert teacher["seed"] == 3
    compose.build(teacher)


def test_it_is_made_once_and_every_method_that_asks_has_it(config_of: Any, tmp_path: Path) -> None:
    asking = [f"compression.{name}.teacher=auto" for name in ("logits", "hidden")]
    config = config_of("compression=[distill/logits,distill/hidden]", *asking)
    made = []
    for number in range(2):
        run = tmp_path / f"run{number}"
        run.mkdir()
        entry.run(config, run, False)
        (teacher,) = [path for path in (tmp_path / "logs" / "teachers").iterdir() if path.is_dir()]
        made.append((teacher / "metrics.json").stat().st_mtime_ns)
        saved = (run / "config.yaml").read_text()
        assert saved.count(f"teacher: logs/teachers/{teacher.name}/model") == 2
        assert "auto" not in [line.partition("teacher: ")[2] for line in saved.splitlines()]
    assert made[0] == made[1]


def test_another_config_has_another_teacher(config_of: Any) -> None:
    first, second = (auto_teacher.of_teacher(config_of(*STUDENT, f"optimizer.lr={rate}")) for rate in (1e-3, 1e-4))
    assert auto_teacher.key_of(first) != auto_teacher.key_of(second)
    same = auto_teacher.of_teacher(config_of(*STUDENT, "optimizer.lr=1e-3", "compression.magnitude.sparsity=0.9"))
    assert auto_teacher.key_of(first) == auto_teacher.key_of(same)


@pytest.mark.parametrize(
    "setting",
    [
        "export=hf",
        "measure=full", "logger=csv", "store=dense", "callbacks=[checkpoint]", "callbacks=[checkpoint,ema]",
        "compression.logits.temperature=3.0",
    ],
)  # fmt: skip
def test_what_the_student_alone_is_told_makes_no_other_teacher(config_of: Any, setting: str) -> None:
    assert key(config_of(*STUDENT)) == key(config_of(*STUDENT, setting))


def test_each_seed_has_its_own(config_of: Any) -> None:
    assert len({key(config_of(*STUDENT, f"seed={seed}")) for seed in (0, 1, 1)}) == 2


def test_its_best_step_is_what_teaches(config_of: Any) -> None:
    for callbacks in (["callbacks=[]"], ["callbacks=[checkpoint,progress,ema]", "callbacks.checkpoint.best=false"]):
        teacher = auto_teacher.of_teacher(config_of(*STUDENT, *callbacks))
        assert teacher["callbacks"]["checkpoint"] == config_of("callbacks=[checkpoint]")["callbacks"]["checkpoint"]
        assert set(teacher["callbacks"]) == {"checkpoint", *(["progress"] if len(callbacks) > 1 else [])}
        compose.build(teacher)


def test_edited_rows_make_another_teacher(config_of: Any, tmp_path: Path) -> None:
    config = config_of(*STUDENT)
    before, file = key(config), Path(config["data"]["train"])
    rows = file.read_bytes()
    file.write_bytes(rows + rows.splitlines(keepends=True)[-1])
    assert key(config) != before
    file.write_bytes(rows)
    assert key(config) == before


def test_another_model_in_the_same_folder_makes_another_teacher(config_of: Any, tmp_path: Path) -> None:
    (tmp_path / "base" / "adapter").mkdir(parents=True)
    for name in ("config.json", "adapter/weights"):
        (tmp_path / "base" / name).write_text("{}")
    config = config_of(*STUDENT)
    config = {**config, "model": {"name": "./base", "layers": None}}
    keys = [key(config)]
    for name in ("config.json", "adapter/weights"):
        (tmp_path / "base" / name).write_text("{ }")
        keys.append(key(config))
    (tmp_path / "base" / ".lock").touch()
    assert len(set(keys)) == 3
    assert key(config) == keys[-1]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("saved", ["task_weight: [", "seed: 9"])
def test_a_folder_that_holds_another_run_is_refused(config_of: Any, done: bool, saved: str) -> None:
    config = config_of(*STUDENT)
    folder = auto_teacher.TEACHERS / key(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(saved)
    if done:
        (folder / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"^teacher=auto: {folder} holds a run of another config"):
        auto_teacher.with_teacher(config, lambda *_: pytest.fail("a run began"))


def test_one_that_was_stopped_is_gone_on_with(config_of: Any) -> None:
    config, calls = config_of(*STUDENT), []
    folder = auto_teacher.TEACHERS / auto_teacher.key_of(auto_teacher.of_teacher(config))
    for begun in (False, True):
        auto_teacher.with_teacher(config, lambda _, where, resume: calls.append((where, resume)))
        write_config(folder, auto_teacher.of_teacher(config))
        assert calls[-1] == (folder, begun)


def test_a_student_that_cannot_be_leaves_no_teacher(config_of: Any, tmp_path: Path) -> None:
    config = config_of(*STUDENT, "compression.magnitude.targets=[nothing]")
    with pytest.raises(ConfigError):
        entry.run(config, tmp_path / "run", False)
    assert not (tmp_path / "logs").exists()


def test_without_one_nothing_is_done(config_of: Any) -> None:
    config = config_of()
    assert auto_teacher.with_teacher(config, lambda *_: pytest.fail("a run began")) is config
