"""Which block learns from which, as the papers say."""

from __future__ import annotations

from typing import Any

import pytest

from niwaki.compression.distill.layers import check_layers, pairs_of
from niwaki.errors import ConfigError


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),  # TinyBERT: g(m) = 3 m
        ("uniform", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ("uniform", 2, 5, [(0, 2), (1, 4)]),
        ("uniform", 4, 2, [(0, 0), (1, 0), (2, 1), (3, 1)]),  # a deeper student
        ("last", 6, 12, [(i, i + 6) for i in range(6)]),  # TinyBERT's top strategy, PKD-Last
        ("last", 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ([[0, 5], [2, 5]], 3, 6, [(0, 5), (2, 5)]),
    ],
)
def test_the_pairs(layers: Any, student: int, teacher: int, pairs: Any) -> None:
    assert pairs_of(layers, student, teacher, "f") == pairs


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([[3, 0]], r"^compression\.x\.layers: \[3, 0\]: the student has the blocks 0\.\.2$"),
        ([[0, 1], [2, 6]], r"^compression\.x\.layers: \[2, 6\]: the teacher has the blocks 0\.\.5$"),
    ],
)
def test_a_block_that_there_is_not(layers: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pairs_of(layers, 3, 6, "compression.x.layers")


def test_the_last_blocks_of_a_teacher_that_has_fewer() -> None:
    with pytest.raises(ConfigError, match=r"^f=last: the student has 3 blocks, the teacher 2; use uniform"):
        pairs_of("last", 3, 2, "f")


@pytest.mark.parametrize("layers", [[], [[0]], [[0, 1, 2]], [[-1, 0]], [[0, 1], [0, 1]]])
def test_what_is_no_map(layers: Any) -> None:
    with pytest.raises(ConfigError, match=r"^f=\[.*needs uniform, last, or different \[student, teacher\] pairs"):
        check_layers(layers, "f")
