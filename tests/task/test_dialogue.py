"""Dialogue: the last turns stay, turns are told apart, and diversity is counted as in the paper."""

from __future__ import annotations

import math

import pytest
from written import batch_of, features, tiny

from niwaki.task.dialogue import Dialogue, distinct, last_turns
from niwaki.task.text_to_text import TextToText
from niwaki.task.translation import Translation

TALK = {"history": [["aa", "bb", "cc"], ["hello"]], "response": ["dd", "hi there"]}


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_turns_are_joined_by_the_separator_token(family: str) -> None:
    task = Dialogue(max_length=32, max_target_length=8)
    _, tokenizer = tiny(family, task)
    tokens = tokenizer.convert_ids_to_tokens(features(task, tokenizer, TALK)[0]["input_ids"])
    assert tokens == ["[CLS]", "a", "##a", "[SEP]", "b", "##b", "[SEP]", "c", "##c", "[SEP]"]


def test_the_oldest_turns_go_first_and_whole() -> None:
    talk = [[1, 1], [2, 2], [3, 3]]
    assert last_turns(talk, [9], 8) == [1, 1, 9, 2, 2, 9, 3, 3]
    assert last_turns(talk, [9], 7) == last_turns(talk, [9], 5) == [2, 2, 9, 3, 3]
    assert last_turns(talk, [9], 4) == [3, 3]
    assert last_turns(talk, [9], 1) == [3]
    assert last_turns([[1], [2, 2, 2, 2], [3]], [9], 4) == [3]  # no turn is left out between two that stay


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_talk_that_is_too_long_keeps_its_edges(family: str) -> None:
    task = Dialogue(max_length=6, max_target_length=8, separator="|")
    _, tokenizer = tiny(family, task)
    row = features(task, tokenizer, TALK)[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert tokens == (["[CLS]", "c", "##c", "[SEP]"] if family == "bart" else ["[CLS]", "c", "##c", "|"])


def test_distinct_by_hand() -> None:
    """5 words in all; 3 of them distinct; pairs: (i, am), (am, i), (i, am): 2 distinct."""
    texts = ["i am i am", "ok"]
    assert distinct(texts, 1) == pytest.approx(3 / 5)
    assert distinct(texts, 2) == pytest.approx(2 / 5)
    assert distinct([""], 1) == 0.0


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_scores(family: str) -> None:
    task = Dialogue(max_length=32, max_target_length=16)
    model, tokenizer = tiny(family, task)
    scores = task.scores((), tokenizer)
    task.score(scores, model, batch_of(task, tokenizer, TALK))
    found = scores.compute()
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert {"bleu", "distinct1", "distinct2"} < set(found)
    assert "version:" in scores.report()["signatures"]["bleu"]
    answered = list(task.answers(model, tokenizer, (), [{"history": talk} for talk in TALK["history"]]))
    assert [set(row) for row in answered] == [{"history", "generated"}] * 2


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_validation_writes_only_what_the_score_to_watch_needs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    own = TextToText.answered
    monkeypatch.setattr(TextToText, "answered", lambda self, *rest: written.append(self.name) or own(self, *rest))
    asked = {"source": ["aa"], "target": ["b b"]}
    for task, rows in ((Dialogue(), TALK), (Translation(), asked)):
        model, tokenizer = tiny(family, task)
        batch = batch_of(task, tokenizer, rows)
        whole, watched = task.scores((), tokenizer), task.scores((), tokenizer)
        task.score(whole, model, batch)
        task.watch(watched, model, batch)
        assert watched.compute()[task.metric] == whole.compute()[task.metric]
        assert set(watched.compute()) == ({"perplexity", "loss"} if task.name == "dialogue" else set(whole.compute()))
    assert written == ["dialogue", "translation", "translation"]


def test_characters_are_the_words_of_texts_without_blanks() -> None:
    """5 characters, 4 of them distinct, and 4 pairs that all are."""
    texts = ["\u6211\u4eec\u6211\u662f\u8c01"]
    assert distinct(texts, 1) == 1.0  # one word
    for tokens in ("zh", "char"):
        assert distinct(texts, 1, tokens) == pytest.approx(4 / 5)
        assert distinct(texts, 2, tokens) == pytest.approx(4 / 5)
    assert distinct(["abc abc \u6211"], 1, "zh") == pytest.approx(2 / 3)
    assert distinct(["abc"], 1, "char") == 1.0
