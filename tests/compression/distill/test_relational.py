"""Relational distillation in plain loops: distances between two rows, angles between three."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.distill.relational import Relational, angles, different, distances
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.teacher import Teacher


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def length(vector: list[float]) -> float:
    return math.sqrt(sum(x * x for x in vector))


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def of_distances(sides: list[list[list[float]]]) -> float:
    pairs = list(itertools.permutations(range(len(sides[0])), 2))
    found = []
    for rows in sides:
        plain = [length(minus(rows[i], rows[j])) for i, j in pairs]
        found.append([d / (sum(plain) / len(plain)) for d in plain])
    return sum(huber(a - b) for a, b in zip(*found, strict=True)) / len(pairs)


def of_angles(sides: list[list[list[float]]]) -> float:
    triples = list(itertools.permutations(range(len(sides[0])), 3))
    found = []
    for rows in sides:
        cosines = []
        for i, j, k in triples:
            one, two = minus(rows[i], rows[j]), minus(rows[k], rows[j])
            cosines.append(sum(x * y for x, y in zip(one, two, strict=True)) / length(one) / length(two))
        found.append(cosines)
    return sum(huber(a - b) for a, b in zip(*found, strict=True)) / len(triples)


def rows_of(states: Any, lengths: list[int], pooling: str) -> list[list[float]]:
    if pooling == "summary":
        return states[:, 0].tolist()
    return [[sum(c) / n for c in zip(*states[row, :n].tolist(), strict=True)] for row, n in enumerate(lengths)]


@pytest.mark.parametrize("pooling", ["mean", "summary"])
@pytest.mark.parametrize(("distance", "angle"), [(1.0, 2.0), (0.0, 1.0), (0.7, 0.0)])
def test_the_formula(pair: Callable[..., Any], pooling: Any, distance: float, angle: float) -> None:
    both = pair(Relational(teacher="x", weight=0.5, distance=distance, angle=angle, pooling=pooling))
    sides = [rows_of(states[-1], both.lengths(), pooling) for states in both.states()]
    expected = distance * of_distances(sides) + angle * of_angles(sides)
    assert expected > 1e-3
    assert both.loss().item() == pytest.approx(0.5 * expected, rel=1e-3)
    assert not both.effects.modules


def test_the_sum_up_of_a_model_that_reads_from_left_to_right(pair: Callable[..., Any]) -> None:
    both = pair(Relational(teacher="x", angle=0.0, pooling="summary"), "llama")
    lengths = both.lengths()
    sides = [[s[-1][row, n - 1].tolist() for row, n in enumerate(lengths)] for s in both.states()]
    assert both.loss().item() == pytest.approx(of_distances(sides), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "classification"), ("t5", "translation"), ("bart", "translation")]
)
@pytest.mark.parametrize("pooling", ["mean", "summary"])
def test_it_is_zero_for_a_student_that_is_its_teacher(
    setting: Callable[..., Any], family: str, task: str, pooling: Any
) -> None:
    one, other = setting(family, task), setting(family, task)
    stage, batch = Relational(teacher="x", pooling=pooling), one.batch()
    assert len(batch["input_ids"]) >= 3
    (term,) = stage.prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model))).terms.values()
    assert term(one.model.eval()(**one.task.inputs(batch)), batch).item() == pytest.approx(0.0, abs=1e-8)
    for linear in Anatomy.of(one.model).linears().values():
        linear.weight.data *= 8
    assert term(one.model(**one.task.inputs(batch)), batch).item() > 1e-6


def test_the_places_are_made_once_for_a_size_where_the_values_are() -> None:
    for order in (2, 3):
        first = different(5, order, torch.device("cpu"))
        assert different(5, order, torch.device("cpu")) is first
        assert different(5, order, torch.device("meta")).device.type == "meta"
        assert [bool(first[index]) for index in itertools.product(range(5), repeat=order)] == [
            len(set(index)) == order for index in itertools.product(range(5), repeat=order)
        ]


def test_neither_size_nor_place_matters() -> None:
    rows = torch.randn(5, 4)
    assert torch.allclose(distances(rows), distances(rows * 7 + 3), atol=1e-5)
    assert torch.allclose(angles(rows), angles(rows * 7 + 3), atol=1e-5)


def test_rows_that_are_the_same_have_finite_gradients(pair: Callable[..., Any]) -> None:
    both = pair(Relational(teacher="x"))
    texts = {"text": ["a pine", "a pine", "no"], "label": ["yes", "yes", "no"]}
    both.loss(both.one.batch(texts)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in both.one.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("count", [1, 2])
def test_batches_too_small_for_a_relation(pair: Callable[..., Any], count: int) -> None:
    both = pair(Relational(teacher="x"))
    batch = {name: part[:count] for name, part in both.one.batch().items()}
    loss = both.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)  # two rows: one distance, which is its own mean


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"distance": -1.0}, "distance=-1.0: needs a number of at least 0"),
        ({"angle": -1.0}, "angle=-1.0: needs a number of at least 0"),
        ({"distance": 0.0, "angle": 0.0}, "distance=0: has no effect with compression.relational.angle=0"),
    ],
)
def test_refusals(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.relational\.{said}"):
        Relational(teacher="x", **fields)
