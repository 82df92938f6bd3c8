"""Every command in the README is one that works: it composes and builds, or the command line knows it."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from niwaki import compose
from niwaki.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def arguments_of(command: str, start: str) -> list[str]:
    words = shlex.split(command)
    assert words[: len(start.split())] == start.split()
    return words[len(start.split()) :]


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) == 29


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py") and "resume=" not in c])
def test_training_commands_build(command: str) -> None:
    parsed = compose.parse(arguments_of(command, "python train.py"))
    points, varied = compose.points(parsed.overrides)
    assert bool(varied) == parsed.multirun
    for point in points:
        compose.build(compose.compose(point).config)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("niwaki")])
def test_niwaki_commands_parse(command: str) -> None:
    name, *arguments = arguments_of(command, "niwaki")
    known = get_command(app).commands[name]  # type: ignore[attr-defined]
    known.make_context(name, arguments, resilient_parsing=False)


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    kinds = ("python train.py", "niwaki ")
    assert [c for c in COMMANDS if not c.startswith(kinds)] == []


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (quickstart|test)\b", README)) <= targets


def test_the_example_of_a_method_is_a_method(setting: Callable[..., Any]) -> None:
    """The class in the README, run as it stands there, keeps the larger half of the weights."""
    import torch

    source = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Magnitude" in b)
    header = (
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from niwaki.compression.prune.scheduled import Scheduled\n"
    )
    space: dict[str, Any] = {"__name__": "niwaki.compression.prune.magnitude"}
    exec(header + source, space)  # our own README
    one = setting()
    context = one.context()
    linear = next(iter(context.targets.values()))
    weight = linear.weight.detach().clone()
    stage = space["Magnitude"](sparsity=0.5)
    stage.prepare(one.model, context)
    assert torch.equal(linear.weight, torch.where(weight.abs() > weight.abs().median(), weight, 0.0))
    assert stage.name == "prune/magnitude"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
