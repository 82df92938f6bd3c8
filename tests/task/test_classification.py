"""Classification: features, pairs, scores by hand, and answers in order."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from niwaki.errors import ConfigError
from niwaki.task.classification import Classification


def test_labels_are_numbered_in_the_order_given(setting: Callable[..., Any]) -> None:
    one = setting()
    assert [row["labels"] for row in one.features()] == [2, 1, 0, 1, 2, 1, 0, 2]
    splits = {"train": Dataset.from_dict({"label": ["yes", "no", "maybe"]})}
    assert one.task.labels(splits) == ("maybe", "no", "yes")


def test_pairs_are_encoded_as_pairs(setting: Callable[..., Any]) -> None:
    one = setting()
    rows = {"text": ["a", "bcd"], "text_pair": ["xy", "z"], "label": ["no", "yes"]}
    batch = one.batch(rows)
    pieces = [one.tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"].tolist()]
    assert pieces == [
        ["[CLS]", "a", "[SEP]", "x", "##y", "[SEP]", "[PAD]"],
        ["[CLS]", "b", "##c", "##d", "[SEP]", "z", "[SEP]"],
    ]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]
    swapped = {"text": ["xy", "z"], "text_pair": ["a", "bcd"], "label": ["no", "yes"]}
    with torch.no_grad():
        logits = [one.model(**one.task.inputs(one.batch(r))).logits for r in (rows, swapped)]
    assert not torch.allclose(*logits)


def test_padding_changes_no_answer(setting: Callable[..., Any]) -> None:
    one = setting()
    together = one.logits()
    with torch.no_grad():
        for i, row in enumerate(one.features()):
            alone = one.model(**one.task.inputs(one.task.collate([row], one.tokenizer))).logits
            assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_truncation_and_length(setting: Callable[..., Any]) -> None:
    one = setting()
    one.task = Classification(max_length=6)
    features = one.features({"text": ["abcdefghij", "a"], "label": ["no", "yes"]})
    assert [len(row["input_ids"]) for row in features] == [row["length"] for row in features] == [6, 3]


def test_scores_by_hand() -> None:
    # labels 0 0 1 1 2, guesses 0 1 1 1 0: accuracy 3/5; F1 of 0: 1/2, of 1: 4/5, of 2: 0; macro 13/30.
    # Matthews (Gorodkin): (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)), c = 3, s = 5,
    # p = (2, 3, 0), t = (2, 2, 1): (15 - 10) / sqrt((25 - 13)(25 - 9))
    labels, guesses = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 0])
    logits = torch.nn.functional.one_hot(guesses, 3).float()
    scores = Classification().scores(("a", "b", "c"))
    for part in (slice(0, 3), slice(3, 5)):
        scores.update(SimpleNamespace(logits=logits[part]), {"labels": labels[part]})
    found = scores.compute()
    right = -torch.log_softmax(torch.tensor([1.0, 0.0, 0.0]), 0)
    assert found == {
        "accuracy": pytest.approx(0.6),
        "f1": pytest.approx(13 / 30),
        "mcc": pytest.approx(5 / (12 * 16) ** 0.5),
        # Each is sure to e / (e + 2) = 0.576, so all are in one of 15 bins: |3/5 - 0.576|
        "ece": pytest.approx(0.6 - right.neg().exp()[0].item(), abs=1e-6),
        "loss": pytest.approx((3 * right[0].item() + 2 * right[1].item()) / 5, rel=1e-5),
    }


def test_the_table_per_class_by_hand() -> None:
    # b: guessed three times, twice right, and true twice; c: true once, never guessed
    scores = Classification().scores(("a", "b", "c"))
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 1, 0]), 3).float()
    scores.update(SimpleNamespace(logits=logits), {"labels": torch.tensor([0, 0, 1, 1, 2])})
    table = scores.report()
    of_b = {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "support": 2.0}
    assert table["per_class"]["b"] == of_b
    assert table["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1.0}
    assert table["averages"]["micro"] == pytest.approx({"precision": 0.6, "recall": 0.6, "f1": 0.6, "support": 5.0})
    assert table["averages"]["macro"]["f1"] == pytest.approx(13 / 30)
    assert table["averages"]["weighted"]["f1"] == pytest.approx((2 * 0.5 + 2 * 0.8) / 5)


def test_the_score_to_watch_can_be_chosen() -> None:
    assert (Classification().metric, Classification(watched="mcc").metric) == ("accuracy", "mcc")


def test_the_calibration_error_by_hand() -> None:
    # Two rows sure to 0.9, one right: |1/2 - 0.9| by 2/3 of the rows; one sure to 0.6 and right: |1 - 0.6| by 1/3.
    chances = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    scores = Classification().scores(("a", "b"))
    scores.update(SimpleNamespace(logits=chances.log()), {"labels": torch.tensor([0, 1, 1])})
    assert scores.compute()["ece"] == pytest.approx((2 * 0.4 + 0.4) / 3, abs=1e-6)


def test_the_loss_and_its_smoothing(setting: Callable[..., Any]) -> None:
    task = setting().task
    outputs, batch = SimpleNamespace(logits=torch.tensor([[2.0, 0.0]])), {"labels": torch.tensor([0])}
    log = torch.log_softmax(torch.tensor([2.0, 0.0]), 0)
    assert task.loss(outputs, batch).item() == pytest.approx(-log[0].item())
    smooth = -(0.9 * log[0] + 0.1 * log.mean()).item()
    assert task.loss(outputs, batch, smoothing=0.1).item() == pytest.approx(smooth)


def test_answers_are_those_of_the_logits_in_order(setting: Callable[..., Any]) -> None:
    one = setting()
    rows = [{"text": text, "id": str(i)} for i, text in enumerate(one.rows["text"] * 5)]
    with torch.no_grad():
        found = list(one.task.answers(one.model, one.tokenizer, one.labels, rows))
    chances = one.logits().softmax(-1)
    assert [answer["id"] for answer in found] == [str(i) for i in range(40)]
    for i, answer in enumerate(found):
        row = chances[i % 8]
        assert answer["label"] == one.labels[int(row.argmax())]
        assert answer["score"] == pytest.approx(float(row.max()), abs=1e-4)
        assert list(answer["scores"]) == list(one.labels)


@pytest.mark.parametrize(
    ("fields", "name"), [({"max_length": 3}, "max_length"), ({"label_smoothing": 1.0}, "label_smoothing")]
)
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^task\.{name}="):
        Classification(**fields)
