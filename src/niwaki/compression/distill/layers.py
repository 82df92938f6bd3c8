"""Which block of the teacher each block of the student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from niwaki.errors import ConfigError

Layers = Literal["uniform", "last"] | Sequence[Sequence[int]]
"""uniform: block m of M from block ceil(m N / M) of N, counted from 1 (TinyBERT's g(m) where M divides N, PKD-Skip).
last: from the last M blocks of the teacher. Or [student, teacher] pairs, counted from 0, in every stack alike."""


def check_layers(layers: Layers, field: str) -> None:
    """Raise ConfigError unless this can be a map."""
    if isinstance(layers, str):
        return
    pairs = [tuple(pair) for pair in layers]
    if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs) or len(set(pairs)) < len(pairs):
        raise ConfigError(
            f"{field}={[list(pair) for pair in pairs]}: needs uniform, last, or different [student, teacher] pairs of "
            "block numbers from 0 up"
        )


def pairs_of(layers: Layers, student: int, teacher: int, field: str) -> list[tuple[int, int]]:
    """(student block, teacher block), counted from 0, in models of so many blocks.

    Raises:
        ConfigError: a block that there is not.
    """
    if layers == "uniform":
        return [(m - 1, -(-m * teacher // student) - 1) for m in range(1, student + 1)]
    if layers == "last":
        if teacher < student:
            raise ConfigError(f"{field}=last: the student has {student} blocks, the teacher {teacher}; use uniform")
        return [(block, block + teacher - student) for block in range(student)]
    pairs = [(int(pair[0]), int(pair[1])) for pair in layers]
    for side, (who, count) in enumerate((("student", student), ("teacher", teacher))):
        wrong = [pair for pair in pairs if pair[side] >= count]
        if wrong:
            raise ConfigError(f"{field}: {list(wrong[0])}: the {who} has the blocks 0..{count - 1}")
    return pairs
