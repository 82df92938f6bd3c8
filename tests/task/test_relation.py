"""Relation extraction: what is read at which mark, the cut of long texts, and the official score by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from niwaki.errors import ConfigError, DataError
from niwaki.task.relation import Relation, directed, per_relation, remarked, window

TEXT = "the <e1>bark</e1> of a <e2>pine</e2>."


def test_the_marks_become_tokens_and_are_found_again(setting: Callable[..., Any]) -> None:
    one = setting(task="relation")
    assert remarked(TEXT, ("$", "#")) == (
        "the $ bark $  of a # pine # .",
        {"<e1>": 4, "</e1>": 11, "<e2>": 19, "</e2>": 26},
    )
    batch = one.batch()
    tokens = [one.tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"].tolist()]
    read = [[row[i] for i in places] for row, places in zip(tokens, batch["marks"].tolist(), strict=True)]
    assert read == [["$", "#"]] * 3
    assert tokens[1].index("#") == batch["marks"][1, 1] < batch["marks"][1, 0]  # the second entity comes first there
    assert batch["labels"].tolist() == [1, 2, 0]


def test_a_model_that_reads_on_is_read_behind_the_entities(setting: Callable[..., Any]) -> None:
    """Its state at a mark that opens an entity has seen nothing of it."""
    one = setting("llama", "relation")
    ((first, second),) = one.batch({"text": [TEXT], "label": ["Other"]})["marks"].tolist()
    (row,) = one.features({"text": [TEXT], "label": ["Other"]})
    tokens = one.tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert [i for i, token in enumerate(tokens) if token == "$"][1] == first
    assert [i for i, token in enumerate(tokens) if token == "#"][1] == second


def test_the_head_is_a_linear_of_both_states(setting: Callable[..., Any]) -> None:
    """The paper's: logits = W [h_e1; h_e2] + b, with W and b put together of the token head's two halves."""
    one = setting(task="relation")
    batch = one.batch()
    head: nn.Linear = one.model.classifier
    with torch.no_grad():
        states = one.model.bert(**one.task.inputs(batch)).last_hidden_state
        found = one.task.predictions(one.model(**one.task.inputs(batch)), batch)
    rows, half = torch.arange(3), len(one.labels)
    pair = torch.cat([states[rows, batch["marks"][:, 0]], states[rows, batch["marks"][:, 1]]], -1)
    weight = torch.cat([head.weight[:half], head.weight[half:]], 1)
    assert head.weight.shape[0] == 2 * half
    assert torch.allclose(found, pair @ weight.T + head.bias[:half] + head.bias[half:], atol=1e-5)


def test_marks_matter(setting: Callable[..., Any]) -> None:
    one = setting(task="relation")
    rows = {"text": ["<e1>bark</e1> of a <e2>pine</e2>", "<e2>bark</e2> of a <e1>pine</e1>"], "label": ["Other"] * 2}
    batch = one.batch(rows)
    with torch.no_grad():
        first, second = one.task.predictions(one.model(**one.task.inputs(batch)), batch)
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_long_text_is_cut_on_both_sides_of_the_entities(setting: Callable[..., Any]) -> None:
    one = setting(task="relation")
    one.task = Relation(max_length=20)
    text = f"{'a ' * 30}<e1>b</e1> c <e2>d</e2>{' e' * 30}"
    (row,) = one.features({"text": [text], "label": ["Other"]})
    assert "".join(one.tokenizer.convert_ids_to_tokens(row["input_ids"])) == "[CLS]aaaaa$b$c#d#eeeeee[SEP]"
    assert [row["input_ids"][i] for i in row["marks"]] == one.tokenizer.convert_tokens_to_ids(["$", "#"])
    far = f"<e1>b</e1> {'c ' * 30}<e2>d</e2>"
    with pytest.raises(DataError, match=r"entities are 36 tokens apart, and task\.max_length=20 has no room"):
        one.features({"text": [far], "label": ["Other"]})


@pytest.mark.parametrize(
    ("count", "first", "last", "most", "kept"),
    [
        (10, 4, 5, 6, [0, 3, 4, 5, 6, 9]),
        (10, 1, 2, 6, [0, 1, 2, 3, 4, 9]),  # nothing before: all the room behind
        (10, 7, 8, 6, [0, 5, 6, 7, 8, 9]),
        (10, 4, 5, 20, list(range(10))),
        (10, 4, 5, 4, [0, 4, 5, 9]),
        (10, 4, 5, 3, None),
    ],
)
def test_the_window(count: int, first: int, last: int, most: int, kept: list[int] | None) -> None:
    special = [1, *[0] * (count - 2), 1]
    assert window(count, first, last, special, most) == kept


def test_the_official_score_by_hand() -> None:
    """As the scorer of SemEval-2010 Task 8 has it: of Cause 3 are predicted, 2 are true, 1 is right (one has the wrong
    direction): P 1/3, R 1/2, F1 0.4; of Part 1 is predicted, 2 are true, 1 is right: P 1, R 1/2, F1 2/3; Other is no
    relation."""
    labels = ("Cause(e1,e2)", "Cause(e2,e1)", "Other", "Part(e1,e2)")
    true = ["Cause(e1,e2)", "Cause(e1,e2)", "Other", "Part(e1,e2)", "Part(e1,e2)", "Other"]
    found = ["Cause(e1,e2)", "Cause(e2,e1)", "Cause(e1,e2)", "Part(e1,e2)", "Other", "Other"]
    task = Relation()
    scores = task.scores(labels)
    for a, b in zip(true, found, strict=True):
        logits = torch.zeros(1, 2, 8)
        logits[0, 0, labels.index(b)] = 5.0
        batch = {"marks": torch.tensor([[0, 1]]), "labels": torch.tensor([labels.index(a)])}
        scores.update(SimpleNamespace(logits=logits), batch)
    computed = scores.compute()
    assert computed["f1"] == pytest.approx((0.4 + 2 / 3) / 2)
    assert computed["precision"] == pytest.approx((1 / 3 + 1) / 2)
    assert computed["recall"] == pytest.approx(0.5)
    assert computed["accuracy"] == pytest.approx(3 / 6)
    table = scores.report()["per_class"]
    assert table["Cause"] == {
        "precision": pytest.approx(1 / 3), "recall": 0.5, "f1": pytest.approx(0.4), "support": 2.0, "predicted": 3.0
    }  # fmt: skip
    assert set(per_relation(found, true, "none")) == {"Cause", "Other", "Part"}  # no such label: all count


def test_a_relation_that_is_true_of_no_row_does_not_count() -> None:
    labels = ("A", "B", "Other")
    scores = Relation().scores(labels)
    for a, b in (("A", "A"), ("A", "B"), ("Other", "A")):
        logits = torch.zeros(1, 2, 6)
        logits[0, 0, labels.index(b)] = 5.0
        scores.update(
            SimpleNamespace(logits=logits), {"marks": torch.tensor([[0, 1]]), "labels": torch.tensor([labels.index(a)])}
        )
    assert scores.compute()["f1"] == pytest.approx(0.5)  # A: P 1/2, R 1/2


def test_what_is_no_relation_is_one_of_the_labels() -> None:
    splits = {"train": Dataset.from_dict({"label": ["A", "B", "no_relation"]})}
    with pytest.raises(ConfigError, match=r"^task\.other='Other': is none of the 3 labels, of which the nearest is"):
        Relation().labels(splits)
    assert (
        Relation(other=None).labels(splits) == Relation(other="no_relation").labels(splits) == ("A", "B", "no_relation")
    )


def test_marks_are_told_apart_by_the_tokenizer(setting: Callable[..., Any]) -> None:
    one = setting(task="relation")
    Relation(marks=(" $", "# ")).equip(one.tokenizer)
    for marks in (("⟦", "⟪"), ("$a", "$b"), ("$", "\u200b")):
        with pytest.raises(
            ConfigError, match=r"^task\.marks=.*the tokenizer does not know them, or does not tell them apart"
        ):
            Relation(marks=marks).equip(one.tokenizer)


def test_each_prediction_is_of_its_row(setting: Callable[..., Any]) -> None:
    one = setting(task="relation")
    batch = one.batch()
    assert one.task.owners(SimpleNamespace(logits=torch.zeros(3, 9, 6)), batch).tolist() == [0, 1, 2]


def test_a_prediction_names_head_and_tail(setting: Callable[..., Any]) -> None:
    assert directed(TEXT, "Part(e1,e2)") == {"head": "bark", "relation": "Part", "tail": "pine"}
    assert directed(TEXT, "Part(e2,e1)") == {"head": "pine", "relation": "Part", "tail": "bark"}
    assert directed(TEXT, "Other") == {"head": "bark", "relation": "Other", "tail": "pine"}
    one = setting(task="relation")
    with torch.no_grad():
        (said,) = one.task.answers(one.model, one.tokenizer, one.labels, [{"text": TEXT}])
        batch = one.batch({"text": [TEXT], "label": ["Other"]})
        chances = one.task.predictions(one.model(**one.task.inputs(batch)), batch).softmax(-1)[0]
    assert said["label"] == one.labels[int(chances.argmax())]
    assert list(said["scores"].values()) == pytest.approx(chances.tolist(), abs=1e-4)


@pytest.mark.parametrize("marks", [("$",), ("$", "$"), ("$", " ")])
def test_marks_must_tell_the_entities_apart(marks: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^task\.marks=.*needs two different marks"):
        Relation(marks=marks)
