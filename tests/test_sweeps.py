import itertools
import shlex
from pathlib import Path

import pytest
import yaml

from niwaki import compose
from niwaki.logger import numbers

SWEEPS = Path(__file__).parents[1] / "sweeps"
README = (SWEEPS / "README.md").read_text(encoding="utf-8")


def commands(sweep):
    """The overrides of each point, as W&B's agent puts them on the command line."""
    axes = [[f"{name}={value}" for value in choice["values"]] for name, choice in sweep["parameters"].items()]
    for point in itertools.product(*axes):
        yield list(
            itertools.chain(*([*point] if word == "${args_no_hyphens}" else [word] for word in sweep["command"]))
        )


@pytest.fixture(params=sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def sweep(request):
    return yaml.safe_load(request.param.read_text(encoding="utf-8")) | {"name": request.param.stem}


def test_every_point_of_a_sweep_is_a_run(sweep):
    for words in commands(sweep):
        assert words[:2] == [".venv/bin/python", "${program}"]
        recipe = compose.build(compose.compose(words[2:]).config)
        assert sweep["metric"]["name"] in numbers({"after": {"test": {recipe.task.metric: 0.5}}})
        assert sweep["metric"]["goal"] == {"max": "maximize", "min": "minimize"}[recipe.task.mode]


def test_the_multirun_in_the_readme_is_the_same_grid(sweep):
    line = next(line for line in README.splitlines() if f"-m study={sweep['name']} " in line)
    points, _ = compose.points(compose.parse(shlex.split(line)[2:]).overrides)
    without = ("study=", "logger=")
    ours = {frozenset(word for word in point if not word.startswith(without)) for point in points}
    theirs = {frozenset(word for word in words[2:] if not word.startswith(without)) for words in commands(sweep)}
    assert ours == theirs
    assert f"{len(theirs)} runs" in README
