"""Spans of a text as answers: the best of them over windows, and how alike two answers are."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A part of a text that begins at its character `start`; the score is the sum of the logits of its two ends. Empty,
    without a start: no answer."""

    text: str
    start: int | None
    score: float


class Best:
    """The best spans of a text that was read in windows."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._spans: dict[tuple[int | None, str], Span] = {}
        self._nothing = Span("", None, math.inf)

    def add(self, found: Sequence[Span]) -> None:
        """Take the spans of one more window. Of the scores of no answer the least counts: any window may have one."""
        for span in found:
            if span.start is None:
                self._nothing = min(self._nothing, span, key=lambda one: one.score)
                continue
            key = (span.start, span.text)
            if key not in self._spans or span.score > self._spans[key].score:
                self._spans[key] = span

    def answer(self, threshold: float | None) -> Span:
        """The best span, or no answer where that scores higher by more than `threshold`, if it is not None, or where
        there is no span."""
        best = max(self._spans.values(), key=lambda one: one.score, default=self._nothing)
        return best if threshold is None or self._nothing.score <= best.score + threshold else self._nothing

    def chances(self) -> list[tuple[Span, float]]:
        """The spans and no answer, best first, with the softmax of their scores."""
        ranked = sorted((self._nothing, *self._spans.values()), key=lambda one: -one.score)[: self._count]
        chances = torch.tensor([span.score for span in ranked], dtype=torch.float64).softmax(0).tolist()
        return list(zip(ranked, chances, strict=True))


def spans_of(logits: Tensor, places: Tensor, begin: int, text: str, count: int, longest: int) -> list[Span]:
    """The best `count` spans of a window, of at most `longest` tokens, and no answer. `logits` (tokens, 2); `places`
    (tokens, 2): the characters of each token in the window's `text`, -1 for one that is no part of it; `begin`: where
    the window begins in the whole text. Both on the CPU. Blanks at the ends of a span, which some tokenizers count to a
    token, are none of its text."""
    inside = torch.nonzero(places[:, 0] >= 0).flatten()
    sums = logits[inside, 0][:, None] + logits[inside, 1][None, :]
    steps = torch.arange(len(inside))
    length = steps[None, :] - steps[:, None] + 1
    sums = sums.masked_fill((length < 1) | (length > longest), -torch.inf)
    best = sums.flatten().topk(min(count, sums.numel()))
    found = {(None, ""): Span("", None, float(logits[0].sum()))}
    of_tokens = places[inside].tolist()
    for score, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if score > -math.inf:
            first, last = divmod(number, len(of_tokens))
            whole = text[of_tokens[first][0] : of_tokens[last][1]]
            start = begin + of_tokens[first][0] + len(whole) - len(whole.lstrip())
            found.setdefault((start, whole.strip()), Span(whole.strip(), start, score))
    return list(found.values())


def english(found: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact` and `f1` in 0..1 as SQuAD 2.0 has them: lower case, without punctuation and articles, F1 over words, of
    the best of the answers that leave something; no answer is right where there is none."""
    pairs = [
        (plain(text).split(), [words for other in wanted if (words := plain(other).split())] or [[]])
        for text, wanted in zip(found, answers, strict=True)
    ]
    return {
        "exact": sum(max(float(one == other) for other in others) for one, others in pairs) / len(pairs),
        "f1": sum(max(shared_words(one, other) for other in others) for one, others in pairs) / len(pairs),
    }


def plain(text: str) -> str:
    """A text in lower case, without punctuation (ASCII) and articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare)


def shared_words(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of the words that both have, as often as both have them; 1 where both are empty."""
    if not one or not other:
        return float(one == other)
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other))


SIGNS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # that CMRC leaves out
CHINESE = re.compile(r"[\u4e00-\u9fa5]")
WORDS = re.compile(r"\w+(?:[.,'’]\w+)*|[^\w\s]")


def chinese(found: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact` and `f1` in 0..1 as CMRC 2018 has them (Cui et al. 2019, arXiv:1810.07366): in lower case and without its
    list of signs; each Chinese character, and each word or sign of other scripts (there by NLTK), is a unit, and F1 is
    of the longest run of units in both. No answer is right where there is none."""
    exact = f1 = 0.0
    for text, wanted in zip(found, answers, strict=True):
        bare, others = without_signs(text), [without_signs(other) for other in (wanted or [""])]
        exact += max(float(bare == other) for other in others)
        f1 += max(overlap(units(bare), units(other)) for other in others)
    return {"exact": exact / len(found), "f1": f1 / len(found)}


def without_signs(text: str) -> str:
    """A text in lower case, without blanks around it and the signs that CMRC leaves out."""
    return "".join(character for character in text.lower().strip() if character not in SIGNS)


def overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of the longest run of units that both have; 1 where both are empty."""
    if not one or not other:
        return float(one == other)
    shared = longest_run(one, other)
    return 2 * shared / (len(one) + len(other))


def longest_run(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest piece that both sequences hold."""
    best, row = 0, [0] * (len(other) + 1)
    for first in one:
        row = [0, *(row[i] + 1 if first == second else 0 for i, second in enumerate(other))]
        best = max(best, *row)
    return best


def units(text: str) -> list[str]:
    """Chinese characters, and words and signs of other scripts, of a text `without_signs`."""
    spread = CHINESE.sub(r" \g<0> ", text)
    return WORDS.findall(spread)
