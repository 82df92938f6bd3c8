"""Regression: the loss, the correlations by hand, and numbers as answers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from niwaki.compression.distill.logits import mean_logits, softened_divergence
from niwaki.compression.quantize.mixed import divergence
from niwaki.errors import ConfigError
from niwaki.task.regression import Regression


def test_one_output_and_its_squared_error(setting: Callable[..., Any]) -> None:
    one = setting(task="regression")
    assert one.model.classifier.weight.shape[0] == 1
    outputs, batch = SimpleNamespace(logits=torch.tensor([[1.0], [3.0]])), {"labels": torch.tensor([2.0, 1.0])}
    assert float(one.task.loss(outputs, batch)) == pytest.approx((1 + 4) / 2)
    assert one.batch()["labels"].tolist() == [4.0, 0.5, 5.0]
    assert int(one.batch()["token_type_ids"].sum()) > 0


def test_scores_by_hand() -> None:
    # labels 1 2 3 4, found 1 2 3 10: Pearson 14 / sqrt(5 * 50), the order is the same, the error 6 in one of four
    scores = Regression().scores(())
    for found, label in (([1.0, 2.0], [1.0, 2.0]), ([3.0, 10.0], [3.0, 4.0])):
        scores.update(SimpleNamespace(logits=torch.tensor(found)[:, None]), {"labels": torch.tensor(label)})
    assert scores.compute() == {
        "pearson": pytest.approx(14 / (5 * 50) ** 0.5), "spearman": pytest.approx(1.0), "rmse": pytest.approx(3.0),
        "loss": pytest.approx(9.0),
    }  # fmt: skip


def test_what_never_varies_is_told_apart_by_nothing() -> None:
    scores = Regression().scores(())
    scores.update(SimpleNamespace(logits=torch.ones(3, 1)), {"labels": torch.tensor([1.0, 2.0, 3.0])})
    found = scores.compute()
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


def test_answers_are_the_numbers_of_the_model(setting: Callable[..., Any]) -> None:
    one = setting(task="regression")
    rows = [{"text": a, "text_pair": b} for a, b in zip(one.rows["text"], one.rows["text_pair"], strict=True)]
    with torch.no_grad():
        said = [row["label"] for row in one.task.answers(one.model, one.tokenizer, (), rows)]
    assert said == pytest.approx(one.logits()[:, 0].tolist(), abs=1e-4)


def test_a_teacher_of_numbers_is_followed_by_their_squared_difference() -> None:
    """KL(N(t, 1) || N(s, 1)) = (s - t)^2 / 2, at any temperature; the mean of teachers is that of their numbers."""
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]])
    for temperature in (1.0, 4.0):
        assert float(softened_divergence(student, teacher, temperature)) == pytest.approx((4 + 1) / 2 / 2)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(teacher, 1.0), normal(student, 1.0)).mean()
    assert float(softened_divergence(student, teacher, 2.0)) == pytest.approx(float(exact))
    assert mean_logits([student, teacher], [3.0, 1.0], 2.0).tolist() == [[1.5], [1.75]]
    assert divergence(student, teacher) == pytest.approx((4 + 1) / 2)


def test_a_number_is_not_smoothed() -> None:
    with pytest.raises(ConfigError, match=r"^task\.label_smoothing=0\.1: has no effect on a number"):
        Regression(label_smoothing=0.1)


def test_a_row_without_an_answer_has_no_error(setting: Callable[..., Any]) -> None:
    one = setting(task="regression")
    batch = one.batch({"text": ["a", "b"], "label": [2.0, None]})
    assert float(one.task.loss(SimpleNamespace(logits=torch.tensor([[1.0], [9.0]])), batch)) == pytest.approx(1.0)
    nothing = one.batch({"text": ["a"], "label": [None]})
    assert float(one.task.loss(SimpleNamespace(logits=torch.tensor([[1.0]])), nothing)) == 0.0
