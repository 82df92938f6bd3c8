"""BLEU counts words, or characters where nothing stands between words."""

from __future__ import annotations

from typing import Any

import pytest
import sacrebleu
from written import tiny

from niwaki import compose
from niwaki.errors import ConfigError

TEXTS = {
    "zh": ("\u6211\u4eec\u90fd\u662f\u5b66\u751f", "\u6211\u4eec\u662f\u5b66\u751f\u3002"),
    "char": ("\u304a\u306f\u3088\u3046\u306d", "\u304a\u306f\u3088\u3046\u3088"),
}


@pytest.mark.parametrize("name", ["translation", "table_to_text", "dialogue", "instruction"])
@pytest.mark.parametrize("tokens", ["zh", "char"])
def test_every_task_with_bleu_counts_as_asked(name: str, tokens: str) -> None:
    written, right = TEXTS[tokens]
    for setting, counted in (([], "13a"), ([f"task.bleu_tokens={tokens}"], tokens)):
        task: Any = compose.build(compose.compose([f"task={name}", *setting]).config).task
        scores = task.scores((), None)
        scores.written, scores.references = [written], [[right]]
        found = scores.compared()["bleu"]
        assert found == pytest.approx(sacrebleu.corpus_bleu([written], [[right]], tokenize=counted).score)
        assert f"tok:{counted}|" in scores.report()["signatures"]["bleu"]
    assert "bleu_tokens" in task.unread


def test_other_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="bleu_tokens"):
        compose.build(compose.compose(["task=translation", "task.bleu_tokens=ja"]).config)


def test_blanks_around_a_reference_are_no_error() -> None:
    from niwaki.task.translation import Translation

    task = Translation()
    scores: Any = task.scores((), tiny("bart", task)[1])
    scores.written, scores.references = ["a b", "c"], [["x", " a b\n"], ["d"]]
    assert scores.compared()["exact"] == 0.5
