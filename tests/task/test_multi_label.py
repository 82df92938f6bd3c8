"""Several labels a text: binary cross-entropy, scores by hand, labels above the threshold."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional

from niwaki.errors import ConfigError, DataError
from niwaki.task.multi_label import MultiLabel


def test_labels_are_those_of_any_row(setting: Callable[..., Any]) -> None:
    one = setting(task="multi_label")
    assert one.batch()["labels"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert one.task.labels({"train": Dataset.from_dict({"labels": one.rows["labels"]})}) == one.labels
    with pytest.raises(DataError, match="has the labels of no row; multi_label needs two"):
        one.task.labels({"train": Dataset.from_dict({"labels": [[], ["x"]]}).select([0])})
    with pytest.raises(DataError, match="has the labels x; multi_label needs two"):
        one.task.labels({"train": Dataset.from_dict({"labels": [[], ["x"]]})})


def test_the_loss_is_binary_cross_entropy_and_predictions_are_of_two_classes(setting: Callable[..., Any]) -> None:
    one = setting(task="multi_label")
    batch, logits = one.batch(), torch.randn(3, 3)
    outputs = SimpleNamespace(logits=logits)
    exact = functional.binary_cross_entropy_with_logits(logits, batch["labels"].float())
    assert float(one.task.loss(outputs, batch)) == pytest.approx(float(exact), rel=1e-5)
    chances = one.task.predictions(outputs, batch).softmax(-1)
    assert torch.allclose(chances[:, 1].view(3, 3), logits.sigmoid(), atol=1e-6)
    assert one.task.owners(outputs, batch).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_scores_by_hand() -> None:
    """Two labels, four rows: a right twice and once too often, b found once of twice."""
    true = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]])
    given = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 0]])
    scores = MultiLabel().scores(("a", "b"))
    for part in (slice(0, 1), slice(1, 4)):
        scores.update(SimpleNamespace(logits=(given[part] * 2 - 1).float()), {"labels": true[part]})
    found, table = scores.compute(), scores.report()
    assert found["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))  # 3 right, 1 too many, 1 missed
    assert found["macro_f1"] == pytest.approx((2 * 2 / (4 + 1) + 2 / (2 + 1)) / 2)
    assert found["exact_match"] == pytest.approx(3 / 4)
    # a: two true among three alike, 2/3; b: its one guess is right, then one of three alike: (1 + 2 / 4) / 2
    assert found["average_precision"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert table["per_class"]["a"] == {
        "precision": pytest.approx(2 / 3),
        "recall": 1.0,
        "f1": pytest.approx(0.8),
        "support": 2.0,
    }
    assert table["averages"]["micro"]["f1"] == pytest.approx(found["micro_f1"])
    assert table["averages"]["macro"]["f1"] == pytest.approx(found["macro_f1"])


def test_answers_hold_the_labels_above_the_threshold(setting: Callable[..., Any]) -> None:
    one = setting(task="multi_label")
    rows = [{"text": text} for text in one.rows["text"]]
    chances = one.logits().sigmoid()
    with torch.no_grad():
        for threshold in (0.2, 0.5, 0.9):
            one.task = MultiLabel(threshold=threshold)
            said = list(one.task.answers(one.model, one.tokenizer, one.labels, rows))
            wanted = [[n for n, p in zip(one.labels, row, strict=True) if p > threshold] for row in chances]
            assert [row["labels"] for row in said] == wanted


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_threshold_is_between_no_and_yes(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"^task\.threshold="):
        MultiLabel(threshold=threshold)


def test_a_label_that_no_row_has_is_not_ranked() -> None:
    scores = MultiLabel().scores(("a", "b"))
    scores.update(
        SimpleNamespace(logits=torch.tensor([[1.0, 2.0], [0.0, 3.0]])), {"labels": torch.tensor([[1, 0], [0, 0]])}
    )
    assert scores.compute()["average_precision"] == 1.0
