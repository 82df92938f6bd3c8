"""Summarization: a short text that says what a long one says (Rush et al. 2015, arXiv:1509.00685)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from niwaki.task.rouge import Words, rouge
from niwaki.task.text_to_text import TextScores, TextToText


@dataclass(frozen=True, kw_only=True)
class Summarization(TextToText):
    """ROUGE-1, 2, L and Lsum in 0..100, of several `references` the best; rougeL, which sees the order of words, is the
    score to watch. `rouge_words`: see `rouge.scorer`; `any` where texts are not English."""

    metric: ClassVar[str] = "rougeL"
    paper: ClassVar[str] = "Rush et al. 2015, arXiv:1509.00685; Lin 2004"
    unread: ClassVar[tuple[str, ...]] = (*TextToText.unread, "rouge_words")

    max_length: int = 384
    rouge_words: Words = "english"

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> TextScores:
        return SummaryScores(tokenizer, self.rouge_words)


class SummaryScores(TextScores):
    """rouge1, rouge2, rougeL and rougeLsum; words: the mean length of what was written."""

    def __init__(self, tokenizer: Any, rouge_words: Words) -> None:
        super().__init__(tokenizer)
        self._words = rouge_words

    def compared(self) -> dict[str, float]:
        lengths = [len(text.split()) for text in self.written]
        return {
            **rouge(self.written, self.references, self._words),
            "words": sum(lengths) / len(lengths),
        }

    def report(self) -> dict[str, Any]:
        """What `compared` did."""
        stems = ", stems" if self._words == "english" else ""
        several = max(map(len, self.references))
        return {
            "signatures": {"rouge": f"rouge-score F1, {self._words} words{stems}, best of up to {several} references"}
        }
