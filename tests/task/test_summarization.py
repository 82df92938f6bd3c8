"""ROUGE: by hand, against the package that papers report with, and in other scripts."""

from __future__ import annotations

import pytest
from written import batch_of, tiny

from niwaki.task.rouge import in_lines, rouge
from niwaki.task.summarization import Summarization


def test_rouge_by_hand() -> None:
    """Written: the cat sat (3 words); reference: the cat ran off (4). Shared: 2 words, 1 pair, a subsequence of 2."""
    found = rouge(["the cat sat"], [["the cat ran off"]], "any")
    assert found["rouge1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert found["rouge2"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(found["rouge1"])


def test_the_best_reference_counts_for_each_kind() -> None:
    several = rouge(["a b c"], [["x y", "a b c", "a b"]], "any")
    assert several == pytest.approx(dict.fromkeys(several, 100.0))
    assert rouge(["a b", "a b"], [["a b"], ["x"]], "any")["rouge1"] == pytest.approx(50.0)


def test_sentences_of_lsum_are_lines() -> None:
    assert in_lines("One. Two! Three") == "One.\nTwo!\nThree"
    assert in_lines("as\nit is. so") == "as\nit is. so"
    swapped = rouge(["Red fox. Blue sky."], [["Blue sky. Red fox."]], "any")
    assert swapped["rougeLsum"] == pytest.approx(100.0)
    assert swapped["rougeL"] == pytest.approx(50.0)


def test_stems_are_english_and_words_are_any() -> None:
    assert rouge(["cats running"], [["cat runs"]], "english")["rouge1"] == pytest.approx(100.0)
    assert rouge(["cats running"], [["cat runs"]], "any")["rouge1"] == 0.0
    assert rouge(["我爱北京"], [["我爱上海"]], "english")["rouge1"] == 0.0
    assert rouge(["我爱北京"], [["我爱上海"]], "any")["rouge1"] == pytest.approx(50.0)
    assert rouge(["größe"], [["Größe"]], "any")["rouge1"] == pytest.approx(100.0)


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_scores_of_a_batch_with_several_references(family: str) -> None:
    task = Summarization(max_length=48, max_target_length=16)
    model, tokenizer = tiny(family, task)
    rows = {
        "source": ["a long text", "b"], "target": ["short", "so"],
        "references": [["short", "small ÿ"], ["so"]],
    }  # fmt: skip
    batch = batch_of(task, tokenizer, rows)
    scores = task.scores((), tokenizer)
    task.score(scores, model, batch)
    assert scores.references == rows["references"]
    scores.written = ["small", "so"]
    found = scores.compute()
    assert found["rouge1"] == pytest.approx(100 * (2 * 0.5 / 1.5 + 1) / 2, abs=20)
    assert found["words"] == 1.0
    assert "best of up to 2 references" in scores.report()["signatures"]["rouge"]
    assert task.metric in found
