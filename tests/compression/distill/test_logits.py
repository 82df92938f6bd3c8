"""Distillation: the loss against plain arithmetic where positions count; a teacher that learns nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.distill import logits
from niwaki.compression.distill.answers import Kept
from niwaki.compression.distill.distillation import Term
from niwaki.compression.distill.logits import Logits, softened_divergence
from niwaki.errors import ConfigError
from niwaki.model.teacher import Teacher
from niwaki.stage import refuse_conflicts

FIELD = "compression.logits.teacher"

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm"), ("bert", "masked_lm")]


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


def pair(setting: Callable[..., Any], family: str, task: str) -> tuple[Any, Any, Term]:
    """A student, its teacher, and the loss term between them."""
    one, other = setting(family, task, seed=0), setting(family, task, seed=1)
    for parameter in other.model.parameters():
        parameter.data *= 3
    stage = Logits(teacher="there", temperature=3.0, weight=0.7)
    places = {("there", FIELD): Teacher(other.model)}
    effects = stage.prepare(one.model, one.context(load_teacher=lambda *place: places[place]))
    (term,) = effects.terms.values()
    assert isinstance(term, Term)
    return one, other, term


def counted(one: Any, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """The positions that count, picked one by one."""
    if one.task.name == "classification":
        return logits.tolist()
    rows = []
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for t in range(length):
            if one.task.name in ("ner", "masked_lm") and batch["labels"][i, t] == -100:
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
    Logits(teacher="x").prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model)))
    assert not any(module.training for module in other.model.modules())


def test_the_learner_does_not_own_the_teacher(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one, other = setting(), setting(seed=1)
    effects = Logits(teacher="x").prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model)))
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
        ({}, "teacher: needs a hub name"), ({"teacher": "x", "temperature": 0.0}, "temperature"),
        ({"teacher": "x", "weight": 0.0}, "weight"), ({"teacher": "x", "weight": -1.0}, "weight"),
        ({"teacher": "x", "beta": 0.3}, "beta=0.3: has no effect with divergence=forward_kl; .*use jensen_shannon"),
        ({"teacher": "x", "divergence": "jensen_shannon", "beta": 1.0}, "beta=1.0: needs a number above 0 and below"),
        ({"teacher": "x", "divergence": "reverse_kl", "alpha": 0.3}, "alpha=0.3: has no effect"),
        ({"teacher": "x", "divergence": "skewed_kl", "alpha": 0.0}, "alpha=0.0: needs"),
        ({"teacher": "x", "top_k": 0}, "top_k=0: needs null or"),
        ({"teacher": "x", "top_k": 3}, "top_k=3: has no effect, there are 3 classes"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(setting: Callable[..., Any], fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.logits\.{name}"):
        build(setting, fields)


def build(setting: Callable[..., Any], fields: dict[str, Any]) -> None:
    """All that a run asks of it before weights are loaded."""
    stage, anatomy = Logits(**fields), setting().context().anatomy
    refuse_conflicts([stage])
    stage.check(anatomy, {})


def test_as_many_likeliest_tokens_as_a_language_model_has(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    words, anatomy = len(one.tokenizer), one.context().anatomy
    Logits(teacher="x", top_k=words - 1).check(anatomy, {})
    with pytest.raises(ConfigError, match=rf"top_k={words}: has no effect, there are {words} classes; leave it null$"):
        Logits(teacher="x", top_k=words).check(anatomy, {})


def mixture(first: list[float], second: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def kl(first: list[float], second: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(first, second, strict=True))


def formula(name: str, p: list[float], q: list[float]) -> float:
    """The papers' divergences of teacher p and student q, with GKD's beta 0.3 and DistiLLM's alpha 0.2."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jensen_shannon":
        return 0.3 * kl(p, mixture(p, q, 0.3)) + 0.7 * kl(q, mixture(p, q, 0.3))
    if name == "skewed_kl":
        return kl(p, mixture(p, q, 0.2))
    return kl(q, mixture(p, q, 0.8))


SETTINGS: dict[str, dict[str, float]] = {
    "forward_kl": {}, "reverse_kl": {}, "jensen_shannon": {"beta": 0.3}, "skewed_kl": {"alpha": 0.2},
    "skewed_reverse_kl": {"alpha": 0.2},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_every_divergence_is_that_of_its_paper(name: Any, top_k: int | None) -> None:
    student, teacher = torch.randn(5, 6), torch.randn(5, 6) * 2
    measure = Logits(teacher="x", divergence=name, **SETTINGS[name]).measure()  # type: ignore[arg-type]
    value = softened_divergence(student, teacher, 3.0, measure, top_k)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(t, 3.0), softmax(s, 3.0)
        if top_k:
            likeliest = sorted(range(6), key=lambda i: -p[i])[:top_k]
            others = [i for i in range(6) if i not in likeliest]
            p, q = ([row[i] for i in likeliest] + [sum(row[i] for i in others)] for row in (p, q))
        total += formula(name, p, q)
    assert value.item() == pytest.approx(9 * total / 5, rel=1e-4)
    assert softened_divergence(teacher, teacher, 3.0, measure, top_k).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_divergence_learns_and_stays_finite_far_away(name: Any) -> None:
    student = torch.tensor([[200.0, -200.0, 0.0, 1.0]], requires_grad=True)
    measure = Logits(teacher="x", divergence=name, **SETTINGS[name]).measure()  # type: ignore[arg-type]
    for top_k in (None, 2):
        student.grad = None
        softened_divergence(student, torch.tensor([[-150.0, 150.0, 0.0, 1.0]]), 1.0, measure, top_k).backward()
        assert student.grad is not None
        assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_keeps_its_size_as_the_temperature_rises(name: Any) -> None:
    """The square of the temperature is what makes it so, in every divergence."""
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    measure = Logits(teacher="x", divergence=name, **SETTINGS[name]).measure()  # type: ignore[arg-type]
    values = [softened_divergence(student, teacher, t, measure).item() for t in (30.0, 60.0)]
    assert values[0] == pytest.approx(values[1], rel=0.1)
    assert values[0] > 1e-3


def test_the_default_is_torch_s_own_kl_bit_for_bit() -> None:
    student, teacher = torch.randn(7, 9), torch.randn(7, 9)
    logs = [torch.log_softmax(logits / 2.0, dim=-1) for logits in (student, teacher)]
    expected = 4.0 * torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
    assert torch.equal(softened_divergence(student, teacher, 2.0, Logits(teacher="x").measure()), expected)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_some_rows_at_a_time_are_the_same_loss_and_gradient(
    name: Any, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, found = torch.randn(11, 40) * 3, []
    stage = Logits(teacher="x", divergence=name, top_k=top_k, **SETTINGS[name])  # type: ignore[arg-type]
    said = Kept(classes=40, top_k=top_k, temperature=2.0 if top_k else None).of(teacher)
    start = torch.randn(11, 40)
    for most in (logits.LARGEST_PART, 4 * 40):
        monkeypatch.setattr(logits, "LARGEST_PART", most)
        for compare in (
            lambda student: softened_divergence(student, teacher, 2.0, stage.measure(), top_k),
            lambda student: stage.compare_remembered(student, said, classes=40),
        ):
            student = start.clone().requires_grad_()
            loss = compare(student)
            loss.backward()
            found.append((loss.detach(), student.grad))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-7)


def test_of_many_rows_nothing_but_the_logits_is_kept_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(64, 40, requires_grad=True) * 1.0, torch.randn(64, 40)
    given = {side.untyped_storage().data_ptr() for side in (student, teacher)}

    def kept() -> int:
        """Bytes beside the given."""
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = softened_divergence(student, teacher, 2.0)
        assert loss.requires_grad
        return sum(size for place, size in found.items() if place not in given)

    assert kept() >= 2 * 64 * 40 * 4
    monkeypatch.setattr(logits, "LARGEST_PART", 8 * 40)
    assert kept() < 40 * 4


def test_rows_of_an_embedding_behind_the_vocabulary_do_not_count() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    padded = torch.cat([teacher, torch.full((3, 2), 9.0)], dim=-1)
    assert torch.equal(softened_divergence(student, padded, 2.0), softened_divergence(student, teacher, 2.0))
