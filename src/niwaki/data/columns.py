"""What a value of each known column must be, and the labels of a column."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from niwaki.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def check_text(value: Any) -> str:
    """A string with something in it; ValueError says what is wrong."""
    if value is None:
        raise ValueError("is empty")
    if not isinstance(value, str):
        raise ValueError(f"is {type(value).__name__} {value!r:.40}, must be text")
    if not value.strip():
        raise ValueError("is empty")
    return value


def check_label(value: Any) -> str:
    """A class as text: names stay, numbers and booleans become their decimal or name."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("is empty")
    if not isinstance(value, str | int | float):
        raise ValueError(f"is {type(value).__name__}, must be text or a number")
    if not str(value).strip():
        raise ValueError("is empty")
    return str(value)


def check_words(value: Any) -> list[str]:
    """A list with at least one word, each a string with something in it."""
    if value is None or (isinstance(value, list) and not value):
        raise ValueError("is empty")
    if not isinstance(value, list):
        raise ValueError(f"is {type(value).__name__} {value!r:.40}, must be a list of words")
    for position, word in enumerate(value, start=1):
        if not isinstance(word, str):
            raise ValueError(f"has {type(word).__name__} {word!r:.40} as word {position}, must be text")
        if not word.strip():
            raise ValueError(f"has an empty word at {position}")
    return value


ANSWERS = ("label", "tags")  # the columns that a model is to find
# Every other column of a task holds text.
CHECKS: dict[str, Callable[[Any], Any]] = {"label": check_label, "tokens": check_words, "tags": check_words}


def values_of(rows: "Dataset", column: str) -> list:
    """A column as Python values, with ClassLabel codes, alone or in lists, as the names of their classes."""
    from datasets import ClassLabel, LargeList, List

    values = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    feature = rows.features[column]
    inner = feature.feature if isinstance(feature, List | LargeList) else feature
    return [_named(value, inner.names) for value in values] if isinstance(inner, ClassLabel) else values


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    # -1 is how published test sets mark rows whose answer is kept back.
    return names[value] if value is not None and 0 <= value < len(names) else None


def labels_of(splits: "Mapping[str, Dataset]", column: str) -> list[str]:
    """The sorted labels of the training split; numbers sort as numbers.

    `column` holds one label a row ("label") or a list of them ("tags"). Raises DataError where another split
    has a label that training never saw.
    """
    known = {label for labels in _label_lists(splits["train"], column) for label in labels}
    ordered = sorted(known, key=_sort_key)
    for split, rows in splits.items():
        for number, labels in enumerate(_label_lists(rows, column), start=1):
            for label in labels:
                if label not in known:
                    raise DataError(_unseen(split, number, rows[number - 1], column, label, ordered))
    return ordered


def _label_lists(rows: "Dataset", column: str) -> list[list[str]]:
    values = rows[column][:]
    return [value if isinstance(value, list) else [value] for value in values]


def _unseen(split: str, number: int, row: dict[str, Any], column: str, label: str, ordered: list[str]) -> str:
    near = nearest(label, ordered)
    text = next((str(value) for name, value in row.items() if name != column), "")
    start = f" ({' '.join(text.split())[:40]!r})" if text else ""
    return (
        f"split {split!r} row {number}{start}: {column} {label!r} never occurs in the {len(ordered)} "
        f"{'classes' if column == 'label' else column} of split 'train'; the nearest is {near!r}"
    )


def _sort_key(label: str) -> tuple[int, float, str]:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
