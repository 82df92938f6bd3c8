"""Only classes of this project, and Lightning's callbacks, by kind; nothing else is even imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping

from niwaki.allow import resolve
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.load import KeepBlocks
from niwaki.stage import Stage
from niwaki.task.task import Task
from niwaki.tuning.lora import LoRA


def test_what_is_allowed() -> None:
    assert resolve("niwaki.tuning.lora.LoRA", (Stage,)) is LoRA
    assert resolve("niwaki.model.load.KeepBlocks", (Edit,)) is KeepBlocks
    assert resolve("pytorch_lightning.callbacks.EarlyStopping", (Stage, Callback)) is EarlyStopping


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "builtins.eval", "posix.system", "subprocess.Popen", "torch.nn.Linear",
        "niwakix.stage.Stage",
        "niwaki", "", "niwaki..stage.Stage", ".niwaki.stage.Stage", "niwaki.stage:Stage",
        "niwaki.stage.Stage()",
        "niwaki.stage.Stage\n", "__main__.Stage", None, 3, ["niwaki.tuning.lora.LoRA"],
    ],
)  # fmt: skip
def test_a_name_outside_is_refused_before_any_import(target: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr("niwaki.allow.importlib.import_module", refuse)
    with pytest.raises(ConfigError, match="only classes of niwaki and pytorch_lightning"):
        resolve(target, (Stage, Task, Edit, Callback))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target",
    [
        "niwaki.model.load.os", "niwaki.artifact.hashlib", "niwaki.artifact.hashlib.sha256",
        "niwaki.artifact.shutil.rmtree",
        "niwaki.artifact.json.loads", "niwaki.stage.abc.ABC", "niwaki.tuning.lora.LoRA.prepare",
        "niwaki.nothing.Here", "niwaki.tuning.lora.Nothing",
    ],
)  # fmt: skip
def test_an_alias_or_a_nested_name_gets_nowhere(target: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no such class|not one of the kinds"):
        resolve(target, (object,))


@pytest.mark.parametrize(
    "target",
    [
        "niwaki.artifact.load",  # a function
        "niwaki.artifact.Path",  # a foreign class under our name
        "niwaki.stage.Phase",  # ours, of another kind
        "niwaki.task.ner.NER",
        "niwaki.artifact.SCHEMA",  # a number
        "niwaki.stage.Term",  # a type that is no class
        "niwaki.callbacks.pl",
        "pytorch_lightning.Trainer",
        "pytorch_lightning.callbacks.EarlyStopping",
    ],
)
def test_functions_and_classes_of_another_kind_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="not one of the kinds allowed here"):
        resolve(target, (Stage, Edit))


def test_a_foreign_class_is_refused_even_where_its_kind_fits() -> None:
    with pytest.raises(ConfigError, match="not one of the kinds"):
        resolve("niwaki.artifact.Path", (object,))


@pytest.mark.parametrize("form", ["{}.Thing", "niwaki.{}.Thing", "niwaki.stage.{}.Thing", "pytorch_lightning.{}.Thing"])
def test_a_module_that_lies_about_is_not_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError):
        resolve(form.format("canary"), (object,))
    assert "canary" not in sys.modules
    assert not (tmp_path / "sang").exists()


def test_the_message_names_the_field_and_the_value() -> None:
    with pytest.raises(ConfigError, match=r"^task\._target_='os\.system': only classes") as caught:
        resolve("os.system", (Task,), "task._target_")
    assert "\n" not in str(caught.value)
