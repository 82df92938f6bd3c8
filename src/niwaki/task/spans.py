"""Spans of a text as answers: the best of them over windows, and how alike two answers are."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def answer(self, threshold: float) -> Span:
        """The best span, or no answer where that scores higher by more than `threshold`."""
        best = max(self._spans.values(), key=lambda one: one.score, default=None)
        return self._nothing if best is None or self._nothing.score > best.score + threshold else best

    def chances(self) -> list[tuple[Span, float]]:
        """The spans and no answer, best first, with the softmax of their scores."""
        ranked = sorted((self._nothing, *self._spans.values()), key=lambda one: -one.score)[: self._count]
        chances = torch.tensor([span.score for span in ranked], dtype=torch.float64).softmax(0).tolist()
        return list(zip(ranked, chances, strict=True))


def spans_of(logits: Tensor, places: Tensor, begin: int, text: str, count: int, longest: int) -> list[Span]:
    """The best `count` spans of a window, of at most `longest` tokens, and no answer. `logits` (tokens, 2); `places`
    (tokens, 2): the characters of each token in the window's `text`, -1 for one that is no part of it; `begin`: where
    the window begins in the whole text."""
    inside = torch.nonzero(places[:, 0] >= 0).flatten()
    starts, ends = (logits[inside, side] for side in (0, 1))
    sums = starts[:, None] + ends[None, :]
    steps = torch.arange(len(inside), device=logits.device)
    length = steps[None, :] - steps[:, None] + 1
    sums = sums.masked_fill((length < 1) | (length > longest), -torch.inf)
    best = sums.flatten().topk(min(count, sums.numel()))
    found = [Span("", None, float(logits[0].sum()))]
    for score, number in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if score > -math.inf:
            first, last = (int(inside[one]) for one in divmod(number, len(inside)))
            start, stop = int(places[first, 0]), int(places[last, 1])
            found.append(Span(text[start:stop], begin + start, score))
    return found


def english(found: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact` and `f1` in 0..1 as SQuAD has them: lower case, without punctuation and articles, F1 over words, of the
    best of the answers; no answer is right where there is none."""
    from torchmetrics.functional.text import squad

    given: list[Any] = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(found)]
    wanted: list[Any] = [
        {"answers": {"text": list(texts) or [""], "answer_start": [0] * max(len(texts), 1)}, "id": str(i)}
        for i, texts in enumerate(answers)
    ]
    scores = squad(given, wanted)
    return {"exact": float(scores["exact_match"]) / 100, "f1": float(scores["f1"]) / 100}


def chinese(found: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact` and `f1` in 0..1 as CMRC 2018 has them (Cui et al. 2019, arXiv:1810.07366): without punctuation; each
    Chinese character and each word of other scripts is a unit, and F1 is of the longest run of units in both."""
    exact = f1 = 0.0
    for text, wanted in zip(found, answers, strict=True):
        pairs = [(units(text), units(other)) for other in (wanted or [""])]
        exact += max(float("".join(one) == "".join(other)) for one, other in pairs)
        f1 += max(overlap(one, other) for one, other in pairs)
    return {"exact": exact / len(found), "f1": f1 / len(found)}


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
    """Characters of Chinese and words of other scripts, in lower case; blanks and punctuation separate them."""
    found: list[str] = []
    inside = False
    for character in text.lower():
        kind = unicodedata.category(character)
        if "\u4e00" <= character <= "\u9fff":
            found.append(character)
            inside = False
        elif character.isspace() or kind[0] in "PS":
            inside = False
        elif inside:
            found[-1] += character
        else:
            found.append(character)
            inside = True
    return found
