"""A teacher that is tuned first: what its run is, that it is made once, and not for a student that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
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
    assert auto_teacher.digest(first) != auto_teacher.digest(second)
    same = auto_teacher.of_teacher(
        config_of(*STUDENT, "optimizer.lr=1e-3", "compression.magnitude.sparsity=0.9", "export=hf")
    )
    assert auto_teacher.digest(first) == auto_teacher.digest(same)


def test_one_that_was_stopped_is_gone_on_with(config_of: Any) -> None:
    config, calls = config_of(*STUDENT), []
    folder = auto_teacher.TEACHERS / auto_teacher.digest(auto_teacher.of_teacher(config))
    for begun in (False, True):
        auto_teacher.with_teacher(config, lambda _, where, resume: calls.append((where, resume)))
        (folder / "config.yaml").touch()
        assert calls[-1] == (folder, begun)


def test_a_student_that_cannot_be_leaves_no_teacher(config_of: Any, tmp_path: Path) -> None:
    config = config_of(*STUDENT, "compression.magnitude.targets=[nothing]")
    with pytest.raises(ConfigError):
        entry.run(config, tmp_path / "run", False)
    assert not (tmp_path / "logs").exists()


def test_without_one_nothing_is_done(config_of: Any) -> None:
    config = config_of()
    assert auto_teacher.with_teacher(config, lambda *_: pytest.fail("a run began")) is config
