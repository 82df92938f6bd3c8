"""Rows made by code: choices that no version of Python changes, whole groups in one split, an end that is told."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from builtin_rows import splits_of

from niwaki.data.builtin.generated import Draws, Generated, Row
from niwaki.data.source import Needs
from niwaki.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pairs(Generated):
    """Two rows for each number below `most`."""

    rows: int = 200
    most: int = 10_000
    apart: ClassVar[tuple[str, ...]] = ("text",)

    def draw(self, draws: Draws) -> list[Row]:
        text = str(draws.between(1, self.most))
        return [{"text": text, "label": "a"}, {"text": text, "label": "b"}]


def test_the_draws_are_pinned() -> None:
    """Mersenne Twister seeded with the first 8 bytes of SHA-256: the same with every Python."""
    draws = Draws("a name")
    assert [draws.between(1, 6) for _ in range(12)] == [3, 2, 4, 3, 4, 6, 3, 4, 3, 2, 3, 1]
    assert draws.shuffled("abcdef") == list("fbecda")
    assert Draws("a name").between(0, 10**9) != Draws("another").between(0, 10**9)


def test_every_end_of_a_range_comes_and_nothing_beyond_it() -> None:
    draws = Draws("ends")
    counts = [0] * 8
    for _ in range(6000):
        counts[draws.between(1, 6)] += 1
    assert counts[0] == counts[7] == 0
    assert all(900 < count < 1100 for count in counts[1:7])


def test_some_takes_each_place_once() -> None:
    assert sorted(Draws("x").some("aabc", 4)) == ["a", "a", "b", "c"]
    assert len(set(Draws("y").some(range(100), 50))) == 50


def test_a_pattern_is_filled_and_begins_with_a_capital() -> None:
    assert Draws("z").fill("{what} is {what}.", {"what": ["ice"]}) == "Ice is ice."


def test_groups_stay_together_and_splits_have_their_shares() -> None:
    splits = splits_of(Pairs(validation_fraction=0.2, test_fraction=0.3))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 100, "validation": 40, "test": 60}
    texts = [{row["text"] for row in rows} for rows in splits.values()]
    assert len(set().union(*texts)) == sum(len(one) for one in texts) == 100


def test_neither_the_seed_nor_the_number_of_rows_changes_the_first_rows() -> None:
    needs = Needs(required=("text", "label"))
    assert Pairs().splits(needs, 0)["train"][:] == Pairs().splits(needs, 1)["train"][:]
    fewer, more = ({row["text"] for rows in splits_of(Pairs(rows=n)).values() for row in rows} for n in (100, 300))
    assert fewer < more
    odd = splits_of(Pairs(rows=101))
    assert sum(len(rows) for rows in odd.values()) == 101


def test_more_rows_than_there_are_is_refused() -> None:
    assert sum(len(rows) for rows in splits_of(Pairs(most=60, rows=120)).values()) == 120
    with pytest.raises(ConfigError, match=r"data\.rows=124: more than this set holds; ask for 120 or fewer$"):
        splits_of(Pairs(most=60, rows=124))


@pytest.mark.parametrize("value", [99, 0, -1, True, 2.5, "many"])
def test_a_number_of_rows_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.rows=.*: must be a whole number, 100 or more$"):
        Pairs(rows=value)  # type: ignore[arg-type]
