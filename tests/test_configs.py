"""Every option of every group composes and builds; none is forgotten."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from niwaki import compose
from niwaki.recipe import AXES, Recipe

FOLDER = compose.config_folder()
MANY = compose.GROUPS_OF_MANY
FILES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
OPTIONS = [name.split("/", 1) for name in FILES if "/" in name and not name.startswith("experiment/")]
EXPERIMENTS = [name.split("/", 1)[1] for name in FILES if name.startswith("experiment/")]
NEEDED = {
    "data/files": ["data.train=rows.jsonl"],
    "data/hub": ["data.path=ag_news"],
    "data/hub/humaneval": ["task=code_generation"],
    "model/pretrained": ["model.name=some/model"],
    "experiment/multi_teacher": ["compression.logits.teacher=one", "compression.logits.more_teachers=[two]"],
    "experiment/tinybert_answers": ["model.name=some/model", "compression.logits.teacher=some/teacher"],
    "experiment/tinybert_task": ["model.name=some/model", "compression.hidden.teacher=some/teacher"],
    "optimizer/adamw8bit": ["trainer=gpu"],
    "optimizer/schedule_free": ["schedule=constant"],
    **{
        f"compression/distill/{name}": [f"compression.{name}.teacher=some/model"]
        for name in (
            "attention",
            "cosine",
            "cross_vocabulary",
            "hidden",
            "logits",
            "minilm",
            "on_policy",
            "pkd",
            "relational",
        )
    },
}


def test_the_count() -> None:
    """A new option changes this number, so that none is lost from the tests unseen."""
    assert len(OPTIONS) == 179
    assert {group for group, _ in OPTIONS} == {*AXES, *MANY}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_builds(group: str, option: str) -> None:
    chosen = f"{group}=[{option}]" if group in MANY else f"{group}={option}"
    recipe = compose.build(compose.compose([chosen, *NEEDED.get(f"{group}/{option}", [])]).config)
    assert isinstance(recipe, Recipe)
    value = getattr(recipe, group)
    assert len(value) == 1 if group in MANY else isinstance(value, AXES[group])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name: str) -> None:
    needed = NEEDED.get(f"experiment/{name}", [])
    assert isinstance(compose.build(compose.compose([f"+experiment={name}", *needed]).config), Recipe)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_lists_every_setting(group: str, option: str) -> None:
    """What can be set stands in the file, so that a plain override reaches it and a reader finds it."""
    node = yaml.safe_load((FOLDER / group / f"{option}.yaml").read_text())
    kind = compose.resolve(node["_target_"], compose.KINDS)
    declared = {field.name for field in dataclasses.fields(kind) if field.init}
    assert set(node) - {"_target_", "defaults"} == declared


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "task"])
def test_a_task_starts_alike_from_its_file_and_from_python(option: str) -> None:
    node = yaml.safe_load((FOLDER / "task" / f"{option}.yaml").read_text())
    kind = compose.resolve(node["_target_"], compose.KINDS)
    plain = {name: list(one) if isinstance(one, tuple) else one for name, one in dataclasses.asdict(kind()).items()}
    taken = {name for name, value in node.items() if str(value).startswith("${")}  # from the rest of the config
    assert {name: plain[name] for name in plain.keys() - taken} == {name: node[name] for name in plain.keys() - taken}


def test_a_nested_option_stands_under_its_own_name() -> None:
    """With that of its group before it where another group has an option of the same name."""
    paths = list((FOLDER / "compression").rglob("*.yaml"))
    stems = [path.stem for path in paths]
    for path in paths:
        own = path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}_{path.stem}"
        assert path.read_text().splitlines()[0] == f"# @package compression.{own}", path


@pytest.mark.parametrize(
    "chosen",
    ["compression=[prune/magnitude,quantize/int8]", "compression=prune/magnitude", "compression=[]"],
)
def test_a_list_of_methods_in_all_its_forms(chosen: str) -> None:
    recipe = compose.build(compose.compose([chosen]).config)
    assert [s.name for s in recipe.stages[1:]] == [n for n in ("prune/magnitude", "quantize/int8") if n in chosen]


def test_a_sweep_over_lists_makes_its_points() -> None:
    points, varied = compose.points(["seed=0,1", "compression=[],[prune/magnitude]", "tuning=lora"])
    assert varied == ["seed", "compression"]
    assert [point[:2] for point in points] == [
        ["seed=0", "compression=[]"],
        ["seed=0", "compression=[prune/magnitude]"],
        ["seed=1", "compression=[]"],
        ["seed=1", "compression=[prune/magnitude]"],
    ]
    assert all(point[2] == "tuning=lora" for point in points)


def test_only_two_files_know_hydra() -> None:
    root = Path(__file__).parents[1]
    knowing = {
        path.relative_to(root).as_posix()
        for path in [root / "train.py", *(root / "src").rglob("*.py")]
        if any(line.startswith(("import hydra", "from hydra", "from omegaconf", "import omegaconf"))
               for line in path.read_text().splitlines())
    }  # fmt: skip
    assert knowing == {"src/niwaki/train.py", "src/niwaki/compose.py"}
