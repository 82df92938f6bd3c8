"""Distillation: the loss against plain arithmetic where positions count; a teacher that learns nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.distill.logits import FIELD, Logits, TeacherTerm, softened_divergence
from niwaki.errors import ConfigError

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")]


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def by_hand(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_the_formula(temperature: float) -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4) * 3
    value = softened_divergence(student, teacher, temperature)
    assert value.item() == pytest.approx(by_hand(student.tolist(), teacher.tolist(), temperature), rel=1e-4)


def test_two_classes_worked_by_hand() -> None:
    # teacher 3/4 : 1/4, student 1/2 : 1/2, T = 1: KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    value = softened_divergence(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), 1.0)
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


def test_the_gradient_keeps_its_size_as_the_temperature_rises() -> None:
    # Hinton et al., equation 4: for a high T and logits of mean zero, T^2 KL has the gradient (z - v) / N.
    student = torch.tensor([[0.5, -0.2, -0.3]], requires_grad=True)
    teacher = torch.tensor([[-0.1, 0.4, -0.3]])
    softened_divergence(student, teacher, 1000.0).backward()
    assert torch.allclose(student.grad, (student.detach() - teacher) / 3, atol=1e-3)  # type: ignore[arg-type]


def pair(setting: Callable[..., Any], family: str, task: str) -> tuple[Any, Any, TeacherTerm]:
    """A student, its teacher, and the loss term between them."""
    one, other = setting(family, task, seed=0), setting(family, task, seed=1)
    for parameter in other.model.parameters():
        parameter.data *= 3
    stage = Logits(teacher="there", temperature=3.0, weight=0.7)
    effects = stage.prepare(one.model, one.context(load_teacher=lambda *place: {("there", FIELD): other.model}[place]))
    (term,) = effects.terms.values()
    assert isinstance(term, TeacherTerm)
    return one, other, term


def counted(one: Any, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """The positions that count, picked one by one."""
    if one.task.name == "classification":
        return logits.tolist()
    rows = []
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for t in range(length):
            if one.task.name == "ner" and batch["labels"][i, t] == -100:
                continue
            if one.task.name == "causal_lm" and t == length - 1:
                continue  # nothing follows
            rows.append(logits[i, t].tolist())
    return rows


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_mean_is_over_the_positions_that_count(setting: Callable[..., Any], family: str, task: str) -> None:
    one, other, term = pair(setting, family, task)
    batch = one.batch()
    assert not batch["attention_mask"].all()  # there is padding
    student, teacher = one.logits(), other.logits()
    expected = 0.7 * by_hand(counted(one, student, batch), counted(one, teacher, batch), 3.0)
    assert expected > 1e-3
    value = term(one.model(**one.task.inputs(batch)), batch)
    assert value.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_what_stands_at_ignored_positions_does_not_matter(setting: Callable[..., Any], family: str, task: str) -> None:
    one, _, term = pair(setting, family, task)
    batch = one.batch()
    outputs = one.model(**one.task.inputs(batch))
    value = term(outputs, batch)
    if task != "classification":
        outputs.logits = outputs.logits.masked_fill(~batch["attention_mask"].bool()[..., None], 50.0)
    assert torch.equal(term(outputs, batch), value)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_it_is_zero_where_student_and_teacher_agree(setting: Callable[..., Any], family: str, task: str) -> None:
    one, other, term = pair(setting, family, task)
    batch = one.batch()
    assert term(other.model(**one.task.inputs(batch)), batch).item() == pytest.approx(0.0, abs=1e-5)


def test_the_teacher_gets_no_gradient_and_the_student_does(setting: Callable[..., Any]) -> None:
    one, other, term = pair(setting, "bert", "ner")
    before = {n: p.detach().clone() for n, p in other.model.named_parameters()}
    batch = one.batch()
    term(one.model(**one.task.inputs(batch)), batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in other.model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in other.model.named_parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in one.model.parameters())


def test_the_teacher_is_in_eval_mode_even_if_it_comes_otherwise(setting: Callable[..., Any]) -> None:
    one, other = setting(), setting(seed=1)
    other.model.train()
    Logits(teacher="x").prepare(one.model, one.context(load_teacher=lambda *_: other.model))
    assert not any(module.training for module in other.model.modules())


def test_the_learner_does_not_own_the_teacher(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one, other = setting(), setting(seed=1)
    effects = Logits(teacher="x").prepare(one.model, one.context(load_teacher=lambda *_: other.model))
    learner = one.learner(effects=[effects])
    learner.train()
    assert not any(module.training for module in other.model.modules())
    assert {n.removeprefix("model.") for n in learner.state_dict()} == set(one.model.state_dict())
    teachers = {id(p) for p in other.model.parameters()}
    assert not teachers & {id(p) for p in learner.parameters()}
    assert not set(map(id, other.model.modules())) & set(map(id, learner.modules()))
    train(learner, [one.batch()] * 2)
    assert not any(module.training for module in other.model.modules())


def test_a_fit_to_the_teacher_alone_comes_closer_to_it(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one, _, term = pair(setting, "bert", "classification")
    batch = one.batch()
    before = term(one.model(**one.task.inputs(batch)), batch).item()
    learner = one.learner()
    learner.terms, learner.task_weight = {"distill/logits": term}, 0.0
    train(learner, [batch] * 20)
    assert term(one.model(**one.task.inputs(batch)), batch).item() < 0.8 * before


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "teacher"), ({"teacher": "x", "temperature": 0.0}, "temperature"),
        ({"teacher": "x", "weight": 0.0}, "weight"), ({"teacher": "x", "weight": -1.0}, "weight"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.logits\.{name}"):
        Logits(**fields)
