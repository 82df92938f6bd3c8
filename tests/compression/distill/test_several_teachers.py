"""Several teachers: the mean of their softened distributions, by hand; each runs once, in its own precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.distill.hidden import Hidden
from niwaki.compression.distill.logits import Logits, mean_logits, softened_divergence
from niwaki.errors import ConfigError
from niwaki.model.teacher import Teacher, precision_of
from niwaki.stage import refuse_conflicts

PLACES = ("first", "second", "third")


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def council(setting: Callable[..., Any], stage: Logits, task: str = "classification") -> tuple[Any, list[Any], Any]:
    """A student, the models of its teachers, and the term."""
    one = setting("bert", task)
    others = [setting("bert", task, seed=seed) for seed in (1, 2, 3)]
    for other in others:
        for parameter in other.model.parameters():
            parameter.data *= 3
    teachers = {place: Teacher(other.model) for place, other in zip(PLACES, others, strict=True)}
    for teacher in teachers.values():
        teacher.terms = 1
    effects = stage.prepare(one.model, one.context(load_teacher=lambda place, field: teachers[place]))
    (term,) = effects.terms.values()
    return one, others, term


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
@pytest.mark.parametrize("task", ["classification", "ner"])
def test_the_mean_of_their_distributions_by_hand(
    setting: Callable[..., Any], task: str, weights: list[float] | None
) -> None:
    stage = Logits(
        teacher="first", more_teachers=["second", "third"], teacher_weights=weights, temperature=3.0, weight=0.7
    )
    one, others, term = council(setting, stage, task)
    batch = one.batch()
    counts = batch["labels"] != -100 if task == "ner" else torch.ones(len(batch["labels"]), dtype=torch.bool)
    student, *theirs = (side.logits()[counts].tolist() for side in (one, *others))
    shares = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    total = 0.0
    for row, s in enumerate(student):
        q = softmax(s, 3.0)
        softened = [softmax(logits[row], 3.0) for logits in theirs]
        p = [sum(share * one[label] for share, one in zip(shares, softened, strict=True)) for label in range(len(q))]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    expected = 0.7 * 9 * total / len(student)
    assert expected > 1e-3
    value = term(one.model(**one.task.inputs(batch)), batch)
    assert value.item() == pytest.approx(expected, rel=1e-3)


def test_several_that_say_the_same_are_one() -> None:
    logits = torch.randn(6, 5)
    mean = mean_logits([logits, logits + 7.0], [1.0, 4.0], 2.0)  # a constant changes no distribution
    torch.testing.assert_close((mean / 2).softmax(-1), (logits / 2).softmax(-1))


def test_each_runs_once_for_a_batch_and_learns_nothing(setting: Callable[..., Any]) -> None:
    one, others, term = council(setting, Logits(teacher="first", more_teachers=["second"]))
    calls = [0, 0, 0]
    for number, other in enumerate(others):
        other.model.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    batch = one.batch()
    term(one.model(**one.task.inputs(batch)), batch).backward()
    assert calls == [1, 1, 0]
    assert all(p.grad is None for other in others for p in other.model.parameters())
    assert any(p.grad is not None for p in one.model.parameters())


def test_the_fields_that_name_them_and_their_precisions() -> None:
    stage = Logits(teacher="first", more_teachers=["second"], precision="bf16")
    assert stage.teachers() == {"compression.logits.teacher": "first", "compression.logits.more_teachers[0]": "second"}
    other = Hidden(teacher="third", precision="int8")
    assert [precision_of(place, [other, stage]) for place in PLACES] == ["bf16", "bf16", "int8"]
    refuse_conflicts([stage, other])
    with pytest.raises(ConfigError, match="they share a teacher, which runs in one precision"):
        refuse_conflicts([stage, Hidden(teacher="second", precision="int8")])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"more_teachers": "second"}, r"more_teachers='second': needs null or a list"),
        ({"more_teachers": []}, r"more_teachers=\[\]: needs null or a list"),
        ({"more_teachers": [""]}, r"more_teachers=\[''\]: needs null or a list"),
        ({"more_teachers": ["auto"]}, r"more_teachers=\['auto'\]: auto is for compression\.logits\.teacher"),
        ({"more_teachers": ["second"], "cache": True}, "cache=true and compression.logits.more_teachers: what is kept"),
        (
            {"more_teachers": ["second"], "teacher_weights": [1.0]},
            r"teacher_weights=\[1\.0\]: needs .* here 2;",
        ),
        (
            {"more_teachers": ["second"], "teacher_weights": [1.0, 0.0]},
            r"teacher_weights=\[1\.0, 0\.0\]: needs",
        ),
        ({"teacher_weights": [1.0]}, r"teacher_weights=\[1\.0\]: needs .* here 1; or null"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.logits\.{message}"):
        Logits(teacher="first", **fields)


@pytest.mark.parametrize("place", ["first", "./first", "first/"])
@pytest.mark.parametrize("named_by_another", [False, True])
def test_none_counts_twice(place: str, named_by_another: bool) -> None:
    stage = Logits(teacher=None if named_by_another else "first", more_teachers=[place])
    with pytest.raises(ConfigError, match=r"^compression\.logits\.more_teachers: 'first' stands twice"):
        refuse_conflicts([stage, Hidden(teacher="first")])


def test_the_likeliest_classes_are_those_of_the_mean() -> None:
    first, second = torch.tensor([[4.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.0, 4.0, 1.0, 0.0]])
    mean = mean_logits([first, second], [1.0, 1.0], 1.0)
    p = [0.5 * (a + b) for a, b in zip(softmax(first[0].tolist(), 1.0), softmax(second[0].tolist(), 1.0), strict=True)]
    q = softmax([0.3, 0.1, -0.2, 0.5], 1.0)
    kept = [0, 1]  # the likeliest of the mean, and the others as one
    pairs = [(p[i], q[i]) for i in kept] + [(p[2] + p[3], q[2] + q[3])]
    expected = sum(a * (math.log(a) - math.log(b)) for a, b in pairs)
    value = softened_divergence(torch.tensor([[0.3, 0.1, -0.2, 0.5]]), mean, 1.0, Logits(teacher="x").measure(), 2)
    assert value.item() == pytest.approx(expected, rel=1e-4)
