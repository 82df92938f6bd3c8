"""JSON: an object a line, or a list of objects."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from niwaki.data.readers import squad
from niwaki.data.readers.rows import Rows, rows_from, text_of
from niwaki.errors import DataError


def read_jsonl(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """One JSON object a line; blank lines are skipped."""
    objects, lines = lines_of(text_of(path, origin), origin)
    return rows_from(columns_of(objects), lines, origin, wanted)


def read_json(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """A JSON list of objects, one object a line, or what SQuAD is published as."""
    objects, numbers, unit = objects_of(path, origin)
    if len(objects) == 1 and squad.is_squad(objects[0]):
        return squad.rows_of(objects[0], origin, wanted)
    return rows_from(columns_of(objects), numbers, origin, wanted, unit=unit)


def objects_of(path: Path, origin: str) -> tuple[list[dict[str, Any]], list[int], str]:
    """The objects of a file, where each stands, and in what this is counted: "line" or "row"."""
    text = text_of(path, origin)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        # What ends its first line with an object, or has more behind one, is meant to have one a line.
        if not text.strip() or error.msg == "Extra data" or text.lstrip().partition("\n")[0].rstrip().endswith("}"):
            return *lines_of(text, origin), "line"
        raise DataError(f"{origin} line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(values, list):
        return [checked_object(values, f"{origin} line 1")], [1], "line"
    objects = [checked_object(value, f"{origin} row {row}") for row, value in enumerate(values, start=1)]
    return objects, list(range(1, len(objects) + 1)), "row"


def lines_of(text: str, origin: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The object of each line that is not blank, and the numbers of these lines."""
    objects, lines = [], []
    # Not splitlines: a JSON string may hold U+2028 and the like as it is.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            objects.append(object_of(content, f"{origin} line {line}"))
            lines.append(line)
    return objects, lines


def object_of(text: str, place: str) -> dict[str, Any]:
    """The object of one line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at character {error.pos + 1}") from None
    return checked_object(value, place)


def checked_object(value: Any, place: str) -> dict[str, Any]:
    """`value`, which must be an object."""
    if not isinstance(value, dict):
        raise DataError(f'{place}: is a {type(value).__name__}, must be an object such as {{"text": "..."}}')
    return value


def columns_of(objects: list[dict[str, Any]]) -> dict[str, list]:
    """By names that any object has; None where one lacks it."""
    names = dict.fromkeys(name for value in objects for name in value)
    return {name: [value.get(name) for value in objects] for name in names}
