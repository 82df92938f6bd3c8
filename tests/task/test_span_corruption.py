"""Span corruption: a case by hand, shares and spans as in the paper, drawn anew in each epoch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from written import batch_of, features, tiny

from niwaki.errors import ConfigError, DataError
from niwaki.model.tiny import Tiny
from niwaki.task.layout import edges
from niwaki.task.span_corruption import SpanCorruption, corrupted, segments, sentinels_of, spans_in
from niwaki.task.task import IGNORED

ROWS = {"text": ["thank you for inviting me to your party last week", "a second text that goes on for some time"]}


def test_the_case_of_the_paper() -> None:
    """Thank you <X> me to your party <Y> week -> <X> for inviting <Y> last <Z>: figure 2 of Raffel et al."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    number = {word: i for i, word in enumerate(words)}
    ids = [number[word] for word in words]
    source, target = corrupted(ids[:-1], [2, 4], [2, 1], [-1, -2, -3])
    named = {**{i: word for word, i in number.items()}, -1: "<X>", -2: "<Y>", -3: "<Z>"}
    assert " ".join(named[i] for i in source) == "Thank you <X> me to your party <Y>"
    assert " ".join(named[i] for i in target) == "<X> for inviting <Y> last <Z>"


def test_shares_and_spans() -> None:
    task = SpanCorruption()
    assert task._spans(100) == (15, 5)
    assert task._spans(512) == (77, 26)
    assert task._spans(2) == (1, 1)
    assert SpanCorruption(noise_share=0.5, mean_span=3.0)._spans(10) == (5, 2)
    assert SpanCorruption(noise_share=0.9, mean_span=1.0)._spans(10) == (9, 1)  # each span has text before it
    assert SpanCorruption(max_length=512).block == 568  # as T5's own code has it


def test_blocks_fill_what_is_read() -> None:
    for length in (16, 64, 128, 300):
        task = SpanCorruption(max_length=length)
        assert task._read(task.block) <= length < task._read(task.block + 1)


def test_segments_are_any_cut_alike() -> None:
    dice = np.random.default_rng(0)
    found = [tuple(segments(4, 2, dice)) for _ in range(3000)]
    assert {one: round(found.count(one) / 3000, 1) for one in set(found)} == {(1, 3): 0.3, (2, 2): 0.3, (3, 1): 0.3}
    assert segments(5, 1, dice) == [5]
    assert segments(3, 3, dice) == [1, 1, 1]


def test_source_and_target_make_the_text_again() -> None:
    task = SpanCorruption(max_length=24)
    _, tokenizer = tiny("t5", task)
    rows = features(task, tokenizer, ROWS)
    assert len(rows) > 2
    batch = task.collate(rows, tokenizer)
    known, end = set(sentinels_of(tokenizer, 1)), tokenizer.eos_token_id
    for row, read, mask, told in zip(rows, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        source, target = read[mask.bool()].tolist(), told[told != IGNORED].tolist()
        assert source[-1] == target[-1] == end
        assert len(source) <= 24
        spans = spans_in(target[:-1], known)
        whole = [token for one in source[:-1] for token in (spans[one] if one in known else [one])]
        assert whole == row["input_ids"]
        noise = sum(map(len, spans.values()))
        assert noise == task._spans(len(whole))[0]
        assert target[-2] in known
        assert not spans[target[-2]]  # the last sentinel stands for nothing


def test_each_epoch_draws_anew_and_every_evaluation_asks_the_same() -> None:
    task = SpanCorruption(max_length=32)
    _, tokenizer = tiny("t5", task)
    rows = features(task, tokenizer, ROWS)
    plain, again = (task.collate(rows, tokenizer)["input_ids"].tolist() for _ in range(2))
    drawn = [task.draw(rows, tokenizer, (0, epoch))["input_ids"].tolist() for epoch in (0, 0, 1)]
    assert plain == again
    assert drawn[0] == drawn[1] != drawn[2]
    alone = task.draw(rows[:1], tokenizer, (0, 0))["labels"][0]
    together = task.draw(rows, tokenizer, (0, 0))["labels"][0]
    assert alone[alone != IGNORED].tolist() == together[together != IGNORED].tolist()


def test_scores_and_predict() -> None:
    task = SpanCorruption(max_length=32, max_new_tokens=12)
    model, tokenizer = tiny("t5", task)
    batch = batch_of(task, tokenizer, ROWS)
    scores: Any = task.scores((), tokenizer)
    task.score(scores, model, batch)
    found = scores.compute()
    outputs = model(**task.inputs(batch))
    logits, targets = task.counted(outputs, batch)
    assert found["loss"] == pytest.approx(task.loss(outputs, batch).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    (row,) = task.answers(model, tokenizer, (), [{"text": "a <extra_id_0> b <extra_id_1>"}])
    assert len(row["spans"]) == 2
    with pytest.raises(DataError, match="leaves nothing out; write <extra_id_0>"):
        list(task.answers(model, tokenizer, (), [{"text": "a"}]))


def test_what_was_written_is_read_by_sentinel() -> None:
    assert spans_in([5, -1, 7, 8, -2, 9, -1, 4], {-1, -2}) == {-1: [7, 8], -2: [9]}


def test_models_and_tokenizers_that_cannot_are_refused() -> None:
    with pytest.raises(ConfigError, match="llama is one of the two"):
        SpanCorruption().check_config(Tiny(name="llama").config())
    with pytest.raises(ConfigError, match=r"has 0 sentinels <extra_id_..>, and a block needs 8"):
        features(SpanCorruption(), Tiny(name="bart").tokenizer(), ROWS)
    assert edges(Tiny(name="t5").tokenizer()) == ([2], [3])
    for settings, message in (
        ({"noise_share": 1.0}, "task.noise_share=1.0"), ({"mean_span": 0.5}, "task.mean_span=0.5"),
        ({"max_new_tokens": 0}, "task.max_new_tokens=0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            SpanCorruption(**settings)


def test_sentinels_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a copy of the whole vocabulary for each row."""
    tokenizer = Tiny(name="t5").tokenizer()
    vocabulary = tokenizer.get_vocab()
    first = sentinels_of(tokenizer, 1)
    assert first == [vocabulary[f"<extra_id_{number}>"] for number in range(len(first))]
    assert f"<extra_id_{len(first)}>" not in vocabulary
    for name in ("get_vocab", "convert_tokens_to_ids"):
        monkeypatch.setattr(type(tokenizer), name, lambda *_: pytest.fail("looked up again"))
    assert sentinels_of(tokenizer, 1) == first
