"""Patient distillation in plain loops: PKD-Skip, PKD-Last, and the states that sum a text up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from niwaki.compression.distill.pkd import PatientDistillation
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import outline
from niwaki.model.teacher import Teacher


def distance(student: Any, teacher: Any) -> float:
    sides = [values.tolist() for values in (student, teacher)]
    norms = [math.sqrt(sum(x * x for x in side)) for side in sides]
    return sum((a / norms[0] - b / norms[1]) ** 2 for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [("uniform", [(1, 2), (2, 4)]), ("last", [(1, 4), (2, 5)]), ([[2, 5], [0, 0]], [(3, 6), (1, 1)])],
)
def test_the_formula(pair: Callable[..., Any], layers: Any, pairs: list[tuple[int, int]]) -> None:
    both = pair(PatientDistillation(teacher="x", layers=layers, weight=3.0), hidden_size=32)
    ours, theirs = both.states()
    rows = range(len(both.lengths()))
    found = [distance(ours[i][row, 0], theirs[j][row, 0]) for i, j in pairs for row in rows]
    assert both.loss().item() == pytest.approx(3 * sum(found) / len(found), rel=1e-4)


def test_the_papers_own_blocks() -> None:
    """Six blocks of twelve: PKD-Skip learns from {2, 4, 6, 8, 10}, PKD-Last from {7, 8, 9, 10, 11}, counted from 1."""

    class Flow:
        def __init__(self, blocks: int) -> None:
            self.blocks = blocks

    for layers, expected in (("uniform", [2, 4, 6, 8, 10]), ("last", [7, 8, 9, 10, 11])):
        stage = PatientDistillation(teacher="x", layers=layers)  # type: ignore[arg-type]
        pairs = stage.pairs(Flow(6), Flow(12))  # type: ignore[arg-type]
        assert [teacher + 1 for _, teacher in pairs] == expected
        assert [student + 1 for student, _ in pairs] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("family", "task"), [("llama", "classification"), ("llama", "causal_lm")])
def test_a_model_that_reads_from_left_to_right_is_summed_up_by_its_last_token(
    pair: Callable[..., Any], family: str, task: str
) -> None:
    both = pair(PatientDistillation(teacher="x", layers=[[0, 1]]), family, task, hidden_size=32)
    ours, theirs = both.states()
    found = [distance(ours[1][row, n - 1], theirs[2][row, n - 1]) for row, n in enumerate(both.lengths())]
    assert both.loss().item() == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_a_mapped_state_at_every_position(pair: Callable[..., Any]) -> None:
    both = pair(PatientDistillation(teacher="x", layers=[[1, 3]], positions="all"), "bert", "ner")
    ours, theirs = both.states()
    mapped = ours[2] @ both.effects.modules["distill/pkd/states_0"].weight.T
    found = [distance(mapped[r, t], theirs[4][r, t]) for r, length in enumerate(both.lengths()) for t in range(length)]
    assert both.loss().item() == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gpt2"])
def test_it_is_zero_for_a_student_that_is_its_teacher(setting: Callable[..., Any], family: str) -> None:
    one, other = setting(family), setting(family)
    stage = PatientDistillation(teacher="x")
    (term,) = stage.prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model))).terms.values()
    batch = one.batch()
    assert term(one.model.eval()(**one.task.inputs(batch)), batch).item() == pytest.approx(0.0, abs=1e-10)


def test_a_student_of_one_block(setting: Callable[..., Any]) -> None:
    one, other = (outline(Anatomy.of(setting(overrides={"num_hidden_layers": n}).model)) for n in (1, 3))
    with pytest.raises(
        ConfigError, match=r"^compression\.pkd\.layers=uniform: leaves out the last block, and the stud"
    ):
        PatientDistillation(teacher="x").compare_outlines(one, other)
