"""What there is to choose from, read from configs and sources as text: nothing is imported, so it is fast."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from niwaki.errors import ConfigError, nearest

# a citation: words that end in a year, then perhaps an arXiv id
CITED = re.compile(r"[A-Z][^();.]*? (?:et al\. )?(?:18|19|20)\d\d(?:, arXiv:[\d.]+\d)?")
BRACKETS = re.compile(r"\s*\([^()]*(?:18|19|20)\d\d[^()]*\)")
# "arXiv:1 et al. 2" is no end; a sentence ends before a capital, a backtick or the end of the text
SENTENCE = re.compile(r".*?[.!?](?=\s+[A-Z`]|\s*$)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice of an axis: `name` as in `axis=name`, what it is in a sentence, where it was published."""

    axis: str
    name: str
    summary: str
    paper: str
    default: bool


def config_folder() -> Path:
    """The folder of the configs: beside the package when installed, else at the top of the checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def axes() -> list[str]:
    """Every axis that has options: the config groups."""
    return sorted(folder.name for folder in config_folder().iterdir() if folder.is_dir())


def options(axis: str | None = None) -> list[Option]:
    """Every option of one axis, or of all, sorted.

    Raises:
        ConfigError: there is no such axis (names the nearest).
    """
    known = axes()
    if axis is not None and axis not in known:
        near = nearest(axis, known)
        raise ConfigError(f"list {axis}: no such axis; did you mean {near}? (there are: {', '.join(known)})")
    chosen = defaults()
    return [
        read_option(one, path, chosen)
        for one in ([axis] if axis else known)
        for path in sorted((config_folder() / one).rglob("*.yaml"))
    ]


def defaults() -> dict[str, Any]:
    """The default option of each axis, a name or a list of names, as train.yaml has it."""
    found: dict[str, Any] = {}
    for entry in read_yaml(config_folder() / "train.yaml")["defaults"]:
        if isinstance(entry, dict):
            found |= entry
    return found


def read_option(axis: str, path: Path, chosen: dict[str, Any]) -> Option:
    """The option of one file. Its own opening comment says what it is, else its module where that is named
    after the option (one method, one file), else its class."""
    name = path.relative_to(config_folder() / axis).with_suffix("").as_posix()
    target = str(read_yaml(path).get("_target_", ""))
    module, described, paper = read_class(target)
    stem = target.split(".")[-2:-1]
    text = opening_comment(path) or (module if stem == [path.stem] else "") or described or target
    usual = chosen.get(axis)
    return Option(
        axis=axis,
        name=name,
        summary=BRACKETS.sub("", first_sentence(text)),
        paper=paper or "; ".join(CITED.findall(" ".join(BRACKETS.findall(first_sentence(text))))),
        default=name in usual if isinstance(usual, list) else name == usual,
    )


def opening_comment(path: Path) -> str:
    """The comment at the top of a config, without Hydra's `@package` line."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def read_class(target: str) -> tuple[str, str, str]:
    """Docstring of the module of a dotted class name, docstring of the class, and its `paper`; empty where
    there is none, or where the class is another package's."""
    place, _, name = target.rpartition(".")
    path = Path(__file__).parents[1] / (place.replace(".", "/") + ".py")
    if not place.startswith("niwaki.") or not path.is_file():
        return "", "", ""
    tree = parsed(path)
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        return ast.get_docstring(tree) or "", "", ""
    return ast.get_docstring(tree) or "", ast.get_docstring(found) or "", paper_of(found)


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def paper_of(found: ast.ClassDef) -> str:
    """The text that a class assigns to `paper`."""
    for node in found.body:
        match node:
            case (
                ast.AnnAssign(target=ast.Name(id="paper"), value=ast.Constant(value=text))
                | ast.Assign(targets=[ast.Name(id="paper")], value=ast.Constant(value=text))
            ):
                return str(text)
    return ""


def first_sentence(text: str) -> str:
    """The first sentence of a text, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    whole = SENTENCE.match(paragraph)
    return whole.group() if whole else paragraph


def read_yaml(path: Path) -> dict[str, Any]:
    """A config file, by libyaml where it is there."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), loader) or {}  # a safe loader, either way


def as_lines(found: list[Option]) -> str:
    """One line an option: `axis=name`, what it is, its paper; a star marks the default."""
    width = max(len(f"{one.axis}={one.name}") for one in found)
    lines = []
    for one in found:
        mark = "*" if one.default else " "
        paper = f" [{one.paper}]" if one.paper else ""
        lines.append(f"{f'{one.axis}={one.name}':<{width}} {mark} {one.summary}{paper}")
    return "\n".join(lines)


def as_markdown(found: list[Option]) -> str:
    """A page with a table for each axis; the default's name is bold."""
    parts = ["# Options", "", "Written by `make docs` from configs/ and the sources. **Bold**: the default."]
    for axis in dict.fromkeys(one.axis for one in found):
        parts += ["", f"## {axis}", "", "| option | what it is | paper |", "|---|---|---|"]
        for one in found:
            if one.axis == axis:
                cells = (f"**{one.name}**" if one.default else one.name, one.summary, one.paper)
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts)
