"""Which linears a method acts on, and how sparse each becomes, where that is told by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import PARTS, Anatomy

Targets = str | Sequence[str] | None
"""A regular expression on the whole name of a linear, some of `PARTS`, or all."""


def check_targets(targets: Targets, field: str) -> None:
    """Raise ConfigError for a regular expression that is none, or a part that there is not."""
    if isinstance(targets, str):
        compiled(targets, f"{field}.targets={targets!r}")
    elif targets is not None and (not targets or set(targets) - set(PARTS)):
        known = ", ".join(PARTS)
        raise ConfigError(f"{field}.targets={list(targets)}: needs a regular expression, or some of {known}")


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """The regular expression.

    Raises:
        ConfigError: it does not parse.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: is no regular expression ({error})") from error


def chosen(
    targets: Targets, field: str, anatomy: Anatomy, linears: Mapping[str, nn.Linear]
) -> dict[str, nn.Linear]:  # fmt: skip
    """Those of `linears` that the setting names.

    Raises:
        ConfigError: it, or a part in it, names none.
    """
    if targets is None:
        return dict(linears)
    if isinstance(targets, str):
        names = {name for name in linears if re.fullmatch(targets, name)}
        if not names:
            raise ConfigError(
                f"{field}.targets={targets!r}: matches no linear of the blocks as a whole; the first is called "
                f"{next(iter(linears))}"
            )
    else:
        playing = {part: players(part, anatomy, linears) for part in targets}
        absent = [part for part, found in playing.items() if not found]
        if absent:
            raise ConfigError(f"{field}.targets={list(targets)}: this family of models has no {absent[0]}")
        names = set().union(*playing.values())
    return {name: linear for name, linear in linears.items() if name in names}


def players(part: str, anatomy: Anatomy, linears: Iterable[str]) -> set[str]:
    """Those of the names that play a part, or stand in the layer that does; adapters that came later change nothing."""
    places = [
        f"{place}.{name}" for place, stack, _ in anatomy.named_blocks() for name, played in stack.linears.items()
        if part in played.split()
    ]  # fmt: skip
    return {linear for linear in linears for place in places if f"{linear}.".startswith(f"{place}.")}


def read_map(path: str, field: str) -> dict[str, float]:
    """{"sparsity": {name or regular expression: fraction of zeros, ...}} from a JSON file.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    where = f"{field}.sparsity_map={path!r}"
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON ({error})") from error
    found = content.get("sparsity") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'{where}: needs {{"sparsity": {{"name of a linear": 0.6, ...}}}}')
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{where}: {name}: {value!r}: needs a number from 0 up, below 1")
        compiled(name, f"{where}: {name}")
    return {name: float(value) for name, value in found.items()}


def by_name(path: str, field: str, names: Iterable[str], rest: float | None) -> dict[str, float]:
    """The sparsity of each name: its own entry in the file, else that of the one expression that matches it whole,
    else `rest`.

    Raises:
        ConfigError: an entry matches nothing, two entries disagree on a name, or a name has none.
    """
    where, entries, names = f"{field}.sparsity_map={path!r}", read_map(path, field), list(names)
    matching = {name: [e for e in entries if e != name and re.fullmatch(e, name)] for name in names}
    unused = set(entries) - set(names) - {entry for found in matching.values() for entry in found}
    if unused:
        raise ConfigError(f"{where}: {min(unused)}: matches none of the linears that are pruned")
    sparsity = {}
    for name in names:
        own = [name] if name in entries else matching[name]
        if len({entries[entry] for entry in own}) > 1:
            raise ConfigError(f"{where}: {own[0]} and {own[1]} both match {name}; leave one out")
        if not own and rest is None:
            raise ConfigError(f"{where}: no entry matches {name}; add one, or {field}.sparsity for all others")
        sparsity[name] = entries[own[0]] if own else float(rest or 0.0)
    return sparsity
