"""ROUGE: n-grams and subsequences that a text shares with references (Lin 2004, W04-1013), by rouge-score."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

Words = Literal["english", "any"]
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
# A Chinese or Japanese character is a word by itself: nothing stands between them.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


class AnyWords:
    """Words of any script, in lower case."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


@cache
def scorer(words: Words, kinds: Sequence[str] = KINDS) -> Any:
    """English: the stems (Porter) of words of a-z and 0-9, as papers report; any: whole words of any script."""
    from rouge_score.rouge_scorer import RougeScorer

    own = AnyWords() if words == "any" else None
    return RougeScorer(list(kinds), use_stemmer=words == "english", tokenizer=own)


def in_lines(text: str) -> str:
    """A text with a sentence a line, which is how rougeLsum tells them apart; one with lines already stays."""
    return text if "\n" in text else "\n".join(part for part in SENTENCE.split(text) if part)


def rouge(
    written: Sequence[str], references: Sequence[Sequence[str]], words: Words, kinds: Sequence[str] = KINDS
) -> dict[str, float]:
    """The mean over all texts of F1 in 0..100, of each text the best over its references (the maximum of each kind, as
    SciTLDR reports it: Cachola et al. 2020, arXiv:2004.15011)."""
    totals = dict.fromkeys(kinds, 0.0)
    one = scorer(words, tuple(kinds))
    for text, others in zip(written, references, strict=True):
        found = one.score_multi([in_lines(other) for other in others], in_lines(text))
        for kind in kinds:
            totals[kind] += found[kind].fmeasure
    return {kind: 100 * total / len(written) for kind, total in totals.items()}
