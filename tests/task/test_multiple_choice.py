"""Multiple choice: rows with different numbers of choices, the loss over them, chance."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from niwaki import compose
from niwaki.errors import ConfigError
from niwaki.task.multiple_choice import MultipleChoice, parted


def test_each_choice_is_read_with_its_question(setting: Callable[..., Any]) -> None:
    one = setting(task="multiple_choice")
    batch = one.batch()
    texts = one.tokenizer.batch_decode(batch["input_ids"])
    assert [text.replace(" [PAD]", "") for text in texts] == [
        "[CLS] what is cut? [SEP] a pine [SEP]",
        "[CLS] what is cut? [SEP] a song [SEP]",
        "[CLS] what is cut? [SEP] rain [SEP]",
        "[CLS] where? [SEP] here [SEP]",
        "[CLS] where? [SEP] at night [SEP]",
    ]
    assert batch["choices"].tolist() == [[0, 1, 2], [3, 4, -1]]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert [row["length"] for row in one.features()] == [sum(map(len, row["input_ids"])) for row in one.features()]


def test_a_choice_that_is_not_there_has_no_chance(setting: Callable[..., Any]) -> None:
    one = setting(task="multiple_choice")
    batch = one.batch()
    outputs = SimpleNamespace(logits=torch.tensor([[1.0], [0.0], [2.0], [3.0], [-1.0]]))
    chances = one.task.predictions(outputs, batch).softmax(-1)
    assert chances[1, 2] == 0
    assert torch.allclose(chances[0], torch.tensor([1.0, 0.0, 2.0]).softmax(0))
    loss = -(torch.tensor([1.0, 0.0, 2.0]).log_softmax(0)[0] + torch.tensor([3.0, -1.0]).log_softmax(0)[0]) / 2
    assert float(one.task.loss(outputs, batch)) == pytest.approx(float(loss))
    assert one.task.owners(outputs, batch).tolist() == [0, 1]


def test_a_row_alone_says_the_same(setting: Callable[..., Any]) -> None:
    one = setting(task="multiple_choice")
    with torch.no_grad():
        together = one.task.predictions(one.model(**one.task.inputs(one.batch())), one.batch())
        for number, row in enumerate(one.features()):
            batch = one.task.collate([row], one.tokenizer)
            alone = one.task.predictions(one.model(**one.task.inputs(batch)), batch)[0]
            assert torch.allclose(together[number, : len(alone)], alone, atol=1e-5)


def test_scores_by_hand(setting: Callable[..., Any]) -> None:
    one = setting(task="multiple_choice")
    scores = one.task.scores(())
    scores.update(SimpleNamespace(logits=torch.tensor([[1.0], [0.0], [2.0], [3.0], [-1.0]])), one.batch())
    found = scores.compute()
    assert found["accuracy"] == 0.5
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_answers_show_the_choice(setting: Callable[..., Any]) -> None:
    one = setting(task="multiple_choice")
    rows = [{"question": q, "choices": c} for q, c in zip(one.rows["question"], one.rows["choices"], strict=True)]
    with torch.no_grad():
        said = list(one.task.answers(one.model, one.tokenizer, (), rows))
        best = one.task.predictions(one.model(**one.task.inputs(one.batch())), one.batch()).argmax(-1).tolist()
    assert [row["label"] for row in said] == best
    assert [row["answer"] for row in said] == [row["choices"][i] for row, i in zip(rows, best, strict=True)]
    assert [len(row["scores"]) for row in said] == [3, 2]


def test_pieces() -> None:
    assert parted("abcdef", [1, 3, 2]) == [["a"], ["b", "c", "d"], ["e", "f"]]
    assert MultipleChoice().outputs(()) == ("right",)


def test_smoothing_goes_to_choices_that_are_there(setting: Callable[..., Any]) -> None:
    one = setting(task="multiple_choice")
    outputs = SimpleNamespace(logits=torch.tensor([[1.0], [0.0], [2.0], [3.0], [-1.0]]))
    three, two = (torch.tensor(values).log_softmax(0) for values in ([1.0, 0.0, 2.0], [3.0, -1.0]))
    exact = -sum(0.9 * logs[0] + 0.1 * logs.mean() for logs in (three, two)) / 2
    assert float(one.task.loss(outputs, one.batch(), smoothing=0.1)) == pytest.approx(float(exact), rel=1e-5)


def test_a_row_without_an_answer_has_no_loss(setting: Callable[..., Any]) -> None:
    one = setting(task="multiple_choice")
    outputs = SimpleNamespace(logits=torch.tensor([[1.0], [0.0], [2.0], [3.0], [-1.0]]))
    batch = one.batch({**one.rows, "label": [0, None]})
    assert float(one.task.loss(outputs, batch)) == pytest.approx(
        -float(torch.tensor([1.0, 0.0, 2.0]).log_softmax(0)[0])
    )


@pytest.mark.parametrize("task", ["multiple_choice", "question_answering", "relation", "multi_label"])
@pytest.mark.parametrize("setting_of_it", ["cache=true", "top_k=1"])
def test_what_is_kept_of_a_teacher_is_told_by_outputs_of_the_head(task: str, setting_of_it: str) -> None:
    chosen = [f"task={task}", "compression=distill/logits", "compression.logits.teacher=some"]
    with pytest.raises(ConfigError, match=rf"^distill/logits with .* and task={task}: a prediction is put together"):
        compose.build(compose.compose([*chosen, f"compression.logits.{setting_of_it}"]).config)


@pytest.mark.parametrize("task", ["question_answering", "ner"])
def test_windows_differ_by_vocabulary(task: str) -> None:
    chosen = [f"task={task}", "compression=distill/cross_vocabulary", "compression.cross_vocabulary.teacher=some"]
    with pytest.raises(ConfigError, match=r"distill/cross_vocabulary"):
        compose.build(compose.compose(chosen).config)
