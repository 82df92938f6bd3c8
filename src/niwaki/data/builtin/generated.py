"""Rows that are made by code: the same on every machine, with every Python, in every run."""

import abc
import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from niwaki.data.source import SPLITS, Needs, Source
from niwaki.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

LEAST_ROWS = 100
REPEATS = 2000  # draws in a row that were all seen before: nothing is left to draw

T = TypeVar("T")
Row = dict[str, Any]


class Draws:
    """Choices that follow from a name alone.

    Of Python's generator only `random()` is used: its sequence is the same in every version, that of `choice`,
    `sample` and `shuffle` is not.
    """

    def __init__(self, name: str) -> None:
        self._random = random.Random(_hash(name)).random

    def chance(self, share: float) -> bool:
        return self._random() < share

    def between(self, least: int, most: int) -> int:
        """A whole number; both ends may come."""
        return least + int(self._random() * (most - least + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[self.between(0, len(items) - 1)]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """That many of the items, each place once, in the order drawn."""
        left = list(items)
        return [left.pop(self.between(0, len(left) - 1)) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.some(items, len(items))

    def fill(self, pattern: str, slots: dict[str, Sequence[str]]) -> str:
        """The pattern with one of `slots[name]` in place of each {name}, and a capital to begin with."""
        text = re.sub(r"\{(\w+)\}", lambda found: self.pick(slots[found[1]]), pattern)
        return text[:1].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class Generated(Source):
    """Rows that `draw` makes; `rows` of them in all three splits together, none of them twice.

    What is drawn at once (the questions on one text) stays in one split: validation takes a share of
    `validation_fraction`, test one of `test_fraction`, in the order of a hash. The rows are like those of a file:
    neither they nor their splits depend on the run's seed.
    """

    rows: int = 2000

    apart: ClassVar[tuple[str, ...]]  # columns: what is drawn with a value of them that was seen before is left out

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole_number("rows", LEAST_ROWS)

    @abc.abstractmethod
    def draw(self, draws: Draws) -> list[Row]:
        """Rows that belong together, at least one, all of the same columns."""

    def identity(self, row: Row) -> str:
        """Equal for two rows that must not be in two splits."""
        return json.dumps([row[column] for column in self.apart], ensure_ascii=False)

    def groups(self) -> Iterator[tuple[str, list[Row]]]:
        """An identity and its rows, without end; ConfigError where no new ones are left."""
        name, seen, repeats, number, made = type(self).__name__, set[str](), 0, 0, 0
        while repeats < REPEATS:
            drawn = self.draw(Draws(f"{name} {number}"))
            number += 1
            identities = {self.identity(row) for row in drawn}
            repeats = repeats + 1 if identities & seen else 0
            if repeats == 0:
                seen |= identities
                made += len(drawn)
                yield min(identities), drawn
        raise ConfigError(f"data.rows={self.rows}: more than this set holds; ask for {made} or fewer")

    def read(self, needs: Needs) -> "dict[str, Dataset]":
        from datasets import Dataset

        kept: list[tuple[str, list[Row]]] = []
        left = self.rows
        for identity, drawn in self.groups():
            kept.append((identity, drawn[:left]))
            left -= len(drawn)
            if left <= 0:
                break
        return {split: Dataset.from_list(rows) for split, rows in self._dealt(kept).items()}

    def _dealt(self, groups: list[tuple[str, list[Row]]]) -> dict[str, list[Row]]:
        """Test and validation take the groups of the lowest hashes, each until it has its share."""
        room = {
            "test": round(self.test_fraction * self.rows),
            "validation": round(self.validation_fraction * self.rows),
        }
        split_of: dict[str, str] = {}
        for identity, rows in sorted(groups, key=lambda group: _hash(group[0])):
            split = next((split for split, free in room.items() if free > 0), "train")
            split_of[identity] = split
            if split in room:
                room[split] -= len(rows)
        return {split: [row for name, rows in groups if split_of[name] == split for row in rows] for split in SPLITS}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
