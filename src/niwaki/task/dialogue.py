"""Dialogue: the next turn of a talk (Vinyals & Le 2015, arXiv:1506.05869; Zhang et al. 2020, arXiv:1911.00536)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from niwaki.data.source import Needs
from niwaki.errors import ConfigError
from niwaki.task.bleu import BleuTokens, bleu, words
from niwaki.task.layout import end_of, layout_for
from niwaki.task.task import Rows
from niwaki.task.text_to_text import TextScores, TextToText


@dataclass(frozen=True, kw_only=True)
class Dialogue(TextToText):
    """perplexity, which is the score to watch (many answers are right that are not the one of the data), bleu, and the
    share of n-grams that are distinct (distinct1, distinct2). Validation within a fit writes no texts.

    Between turns stands `separator`, null for the tokenizer's separator token, else its end token, as in DialoGPT. What
    does not fit in `max_length` is left out from the oldest turn on; of a last turn that is too long, its beginning.
    """

    needs: ClassVar[Needs] = Needs(required=("history", "response"))
    answer: ClassVar[str] = "response"
    metric: ClassVar[str] = "perplexity"
    mode: ClassVar[Literal["max", "min"]] = "min"
    paper: ClassVar[str] = "Vinyals & Le 2015, arXiv:1506.05869; Li et al. 2016, arXiv:1510.03055"
    unread: ClassVar[tuple[str, ...]] = (*TextToText.unread, "bleu_tokens")

    max_target_length: int = 64
    bleu_tokens: BleuTokens = "13a"

    def _read(self, rows: Rows, tokenizer: Any) -> list[list[int]]:
        layout = layout_for(tokenizer)
        between = self._between(tokenizer)
        before, behind = layout.around(tokenizer, self.separator)
        behind = behind if layout.crossed else between  # a response is the next turn
        lead = tokenizer(self.prefix.format(), add_special_tokens=False)["input_ids"]
        room = self.max_length - len(before) - len(behind) - len(lead)
        if room < 1:
            raise ConfigError(f"task.max_length={self.max_length}: what stands around a talk takes all of it")
        turns = [turn for history in rows["history"] for turn in history]
        encoded = iter(tokenizer(turns, add_special_tokens=False, verbose=False)["input_ids"])
        talks = [[next(encoded) for _ in history] for history in rows["history"]]
        return [[*before, *lead, *last_turns(talk, between, room), *behind] for talk in talks]

    def _between(self, tokenizer: Any) -> list[int]:
        if self.separator is not None:
            found: list[int] = tokenizer(self.separator, add_special_tokens=False)["input_ids"]
            return found
        return [tokenizer.sep_token_id if tokenizer.sep_token_id is not None else end_of(tokenizer)]

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> TextScores:
        return ResponseScores(tokenizer, self.bleu_tokens)


def last_turns(talk: Sequence[list[int]], between: list[int], room: int) -> list[int]:
    """The last turns of a talk that fit, joined; the end of the last one where not even that fits."""
    kept = talk[-1][-room:]
    for turn in reversed(talk[:-1]):
        if len(turn) + len(between) + len(kept) > room:
            break
        kept = [*turn, *between, *kept]
    return kept


def distinct(texts: Sequence[str], n: int, tokens: BleuTokens = "13a") -> float:
    """Distinct n-grams of words in all texts, by the words in all texts (Li et al. 2016)."""
    found = [words(text, tokens) for text in texts]
    grams = {tuple(one[i : i + n]) for one in found for i in range(len(one) - n + 1)}
    return len(grams) / max(1, sum(map(len, found)))


class ResponseScores(TextScores):
    """bleu in 0..100 with sacrebleu's settings; distinct1 and distinct2 in 0..1."""

    def __init__(self, tokenizer: Any, bleu_tokens: BleuTokens = "13a") -> None:
        super().__init__(tokenizer)
        self._bleu = bleu(bleu_tokens)
        self._words: BleuTokens = bleu_tokens

    def compared(self) -> dict[str, float]:
        return {
            "bleu": self._bleu.corpus_score(self.written, self.streams).score,
            "distinct1": distinct(self.written, 1, self._words),
            "distinct2": distinct(self.written, 2, self._words),
        }

    def report(self) -> dict[str, Any]:
        """sacrebleu's own words for what `compared` did."""
        return {"signatures": {"bleu": str(self._bleu.get_signature())}}
