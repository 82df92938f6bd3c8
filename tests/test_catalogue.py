import subprocess
import sys
from pathlib import Path

import pytest

from niwaki import catalogue
from niwaki.catalogue import config_folder, options
from niwaki.errors import ConfigError

ROOT = Path(__file__).parents[1]
MANY = {"callbacks", "compression", "experiment", "export"}


def named(axis):
    return {one.name: one for one in options(axis)}


def test_every_config_file_is_an_option():
    files = {
        path.relative_to(config_folder()).with_suffix("").as_posix()
        for path in config_folder().rglob("*.yaml")
        if path.parent != config_folder()
    }
    found = [f"{one.axis}/{one.name}" for one in options()]
    assert sorted(found) == sorted(files)
    assert "compression/prune/magnitude" in found


def test_every_option_says_what_it_is_and_every_method_where_it_was_published():
    for one in options():
        assert one.summary, one
        assert "\n" not in one.summary + one.paper
        if one.axis in ("task", "tuning", "compression"):
            assert any(year in one.paper for year in ("19", "20")), one


def test_the_paper_comes_from_the_class_or_else_from_what_its_docstring_cites():
    assert named("tuning")["lora"].paper == "Hu et al. 2021, arXiv:2106.09685"
    adamw = named("optimizer")["adamw"]
    assert adamw.paper == "Loshchilov & Hutter 2017, arXiv:1711.05101"
    assert "2017" not in adamw.summary
    assert named("schedule")["linear"].paper == ""


def test_defaults_are_those_of_train_yaml():
    for axis in set(catalogue.axes()) - MANY:
        assert sum(one.default for one in options(axis)) == 1, axis
    assert named("task")["classification"].default
    assert {name for name, one in named("callbacks").items() if one.default} == {
        "checkpoint",
        "learning_rate",
        "progress",
    }
    assert not any(one.default for one in options("compression"))


def test_reads_without_importing_what_it_reads_about():
    code = (
        "import sys\nfrom niwaki import catalogue\nprint(len(catalogue.options()))\n"
        "heavy = ('torch', 'transformers', 'hydra', 'pytorch_lightning')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [str(len(options())), "[]"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "train.yaml").write_text(
        "defaults:\n  - _self_\n  - tuning: b\n  - override hydra/job_logging: disabled\n"
    )
    (tmp_path / "tuning").mkdir()
    monkeypatch.setattr(catalogue, "config_folder", lambda: tmp_path)
    return tmp_path / "tuning"


def test_an_opening_comment_comes_first(folder):
    comment = "# @package tuning\n# Own words (v. 2.5)\n# on two lines. And more.\n"
    text = f"{comment}_target_: niwaki.tuning.lora.LoRA\n# later\n"
    (folder / "lora.yaml").write_text(text)
    (one,) = options()
    assert one.summary == "Own words (v. 2.5) on two lines."
    assert one.paper == "Hu et al. 2021, arXiv:2106.09685"
    assert not one.default


def test_then_the_module_that_bears_the_option_s_name_then_the_class(folder):
    (folder / "lora.yaml").write_text("_target_: niwaki.tuning.lora.LoRA\n")
    (folder / "b.yaml").write_text("_target_: niwaki.tuning.lora.LoRA\n")
    by_class, by_module = options()
    assert (
        by_module.summary
        == "LoRA, with rank-stabilised scaling, two learning rates, and starts from the weight itself: PiSSA and OLoRA."
    )
    assert by_class.summary.startswith("W + (alpha / rank) B A")
    assert by_class.default


def test_a_class_of_another_package_is_named_and_not_read(folder):
    (folder / "b.yaml").write_text("_target_: pytorch_lightning.callbacks.Timer\n")
    (one,) = options()
    assert one.summary == "pytorch_lightning.callbacks.Timer"


def test_an_unknown_axis_names_the_nearest():
    with pytest.raises(ConfigError, match=r"list tunin: no such axis; did you mean tuning\?"):
        options("tunin")


def test_lines_mark_the_default_and_show_the_paper():
    lines = catalogue.as_lines(options("tuning")).splitlines()
    assert len(lines) == len(options("tuning"))
    full = next(line for line in lines if line.startswith("tuning=full "))
    assert " * " in full
    assert full.endswith("[Devlin et al. 2019, arXiv:1810.04805]")
    assert " * " not in next(line for line in lines if line.startswith("tuning=lora "))


def test_the_page_in_docs_is_that_of_today():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == catalogue.as_markdown(options()) + "\n", "run: make docs"
