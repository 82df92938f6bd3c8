"""Which rows of a split to take: carving splits, few shots, limits. All are pure functions of the seed."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from niwaki.data.columns import KEPT_BACK, NAMES
from niwaki.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def carve(rows: "Dataset", fractions: dict[str, float], seed: int, *, in_order: bool) -> dict[str, list[int]]:
    """Row numbers, ascending, of "train" and of each split in `fractions` (shares of all the rows).

    Rows that are asked of the same (`groups`) go to one split, classes keep their shares, and each label
    keeps a row in train. With `in_order` the splits are the last rows instead, in the order of `fractions`.
    """
    if in_order:
        return _cut(rows.num_rows, fractions)
    labels = _labels(rows)
    of_one = groups(rows)
    order = np.random.default_rng([seed, 1]).permutation(len(of_one))
    free = _without_first_of_each_label([of_one[i] for i in order], labels)
    free.sort(key=lambda group: labels[group[0]][0] if len(labels[group[0]]) == 1 else "")
    parts: dict[str, list[int]] = {}
    for split, fraction in fractions.items():
        parts[split] = _spread(free, round(fraction * rows.num_rows), seed)
        taken = set(parts[split])
        free = [group for group in free if group[0] not in taken]
    gone = {row for part in parts.values() for row in part}
    return {"train": [row for row in range(rows.num_rows) if row not in gone], **parts}


def _cut(count: int, fractions: dict[str, float]) -> dict[str, list[int]]:
    sizes = {split: round(fraction * count) for split, fraction in fractions.items()}
    stop = count - sum(sizes.values())
    parts = {"train": list(range(stop))}
    for split, size in sizes.items():
        parts[split] = list(range(stop, stop + size))
        stop += size
    return parts


def _labels(rows: "Dataset") -> list[list[str]]:
    column = next((name for name in ("label", "labels", "tags") if name in rows.column_names), None)
    if column is None or not has_classes(rows, column):
        return [[""]] * rows.num_rows
    return [[str(one) for one in (value if isinstance(value, list) else [value])] for value in rows[column][:]]


def has_classes(rows: "Dataset", column: str) -> bool:
    """Whether a column of answers holds classes, rather than numbers on a scale."""
    return not str(getattr(rows.features[column], "dtype", "")).startswith("float")


def groups(rows: "Dataset") -> list[list[int]]:
    """Row numbers of the rows that belong together: those of equal text, spacing and case aside, in the first column
    that is neither an answer nor a name (a context, a question, what was said before the first answer); and those whose
    history goes on from the history and response of another, as far as histories are whole."""
    column = next(name for name in rows.column_names if name not in (*KEPT_BACK, *NAMES))
    keys = [_key(value) for value in rows[column][:]]
    if column == "history":
        said = rows["response"][:] if "response" in rows.column_names else _chosen(rows)
        keys = _first_of_each_conversation(keys, [() if text is None else _key([text]) for text in said])
    found: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        found[key].append(number)
    return list(found.values())


def _chosen(rows: "Dataset") -> list[str | None]:
    """Of each row what came next after its history, where it says so."""
    return [text if label else None for text, label in zip(rows["candidate"][:], rows["label"][:], strict=True)]


Key = tuple[str, ...]


def _key(value: Any) -> Key:
    """The texts of a value: itself, a list of them, or the turns of a conversation up to the first answer."""
    texts = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict) and part["role"] == "assistant":
            break
        texts.append(part["content"] if isinstance(part, dict) else part)
    return tuple(" ".join(text.split()).casefold() for text in texts)


def _first_of_each_conversation(histories: list[Key], responses: list[Key]) -> list[Key]:
    """For each row the history of the first row of its conversation: one whose history and response it begins with."""
    first: dict[Key, Key] = {}
    found: list[Key] = [()] * len(histories)
    for row in sorted(range(len(histories)), key=lambda row: len(histories[row])):
        history = histories[row]
        before = (history[:end] for end in range(len(history), 1, -1))
        found[row] = next((first[turns] for turns in before if turns in first), history)
        first.setdefault(history + responses[row], found[row])
    return found


def _without_first_of_each_label(groups: list[list[int]], labels: list[list[str]]) -> list[list[int]]:
    seen: set[str] = set()
    free = []
    for group in groups:
        held = {label for row in group for label in labels[row]}
        if held <= seen:
            free.append(group)
        seen |= held
    return free


def _spread(groups: list[list[int]], size: int, seed: int) -> list[int]:
    """About `size` rows in whole groups, taken at even distances so that sorted classes keep their shares."""
    count = sum(len(group) for group in groups)
    if not count or not size:
        return []
    step = count / min(size, count)
    mark = np.random.default_rng([seed, 2]).uniform(0, step)
    chosen: list[int] = []
    start = 0
    for group in groups:
        if len(chosen) < size and start <= mark < start + len(group):
            chosen += group
            # A group of many rows pays for all of them.
            mark += step * len(group)
        start += len(group)
    return sorted(chosen)


def choose_shots(labels: Sequence[str | Sequence[str]], shots: int, seed: int) -> list[int]:
    """Row numbers, ascending, of `shots` rows drawn for each label, of which one that has several may be drawn for each
    of them. DataError names a label that has fewer."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, given in enumerate(labels):
        for label in [given] if isinstance(given, str) else given:
            rows_of[label].append(number)
    generator = np.random.default_rng([seed, 3])
    chosen: set[int] = set()
    for label in sorted(rows_of):
        rows = rows_of[label]
        if len(rows) < shots:
            raise DataError(f"data.shots={shots}: class {label!r} has only {len(rows)} training rows")
        chosen.update(rows[i] for i in generator.choice(len(rows), shots, replace=False))
    return sorted(chosen)


def choose_limit(rows: "Dataset", limit: int, seed: int) -> list[int]:
    """Row numbers, ascending, of a sample that holds each label once, as far as `limit` reaches."""
    labels = _labels(rows)
    order = [[int(i)] for i in np.random.default_rng([seed, 4]).permutation(rows.num_rows)]
    rest = {row for [row] in _without_first_of_each_label(order, labels)}
    first = [row for [row] in order if row not in rest]
    return sorted((first + [row for [row] in order if row in rest])[:limit])
