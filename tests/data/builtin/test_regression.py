"""Pairs of sentences: the label is the number of shared facts, which words in common do not tell."""

import re
from collections import Counter

import numpy as np
from builtin_rows import check_generated, rows_of, splits_of

from niwaki.data.builtin.regression import FACTS, FactPairs

FIRST = {
    "text": "A physician fixed a raincoat in a village ten years ago.",
    "text_pair": "At dawn, a hospital nurse found a wristwatch at the train station.",
    "label": 0.0,
}


def facts(text: str) -> list[int]:
    """Which fact of each kind a sentence tells; of wordings that hold one another the longest counts."""
    found = []
    for wordings in FACTS:
        told = [(len(words), number) for number, fact in enumerate(wordings) for words in fact
                if re.search(rf"\b{re.escape(words)}\b", text, re.IGNORECASE)]  # fmt: skip
        found.append(max(told)[1])
    return found


def overlap(text: str, pair: str) -> float:
    """Words in both, of the words in either."""
    one, other = (set(re.findall(r"\w+", part.lower())) for part in (text, pair))
    return len(one & other) / len(one | other)


def test_the_rows_are_as_promised() -> None:
    given = lambda row: [row["text"], row["text_pair"]]  # noqa: E731
    check_generated(FactPairs(), {"text", "text_pair", "label"}, "d94ad984df1d", given)
    assert splits_of(FactPairs())["train"][0] == FIRST


def test_every_grade_is_about_as_frequent() -> None:
    counts = Counter(row["label"] for row in rows_of(FactPairs()))
    assert set(counts) == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert min(counts.values()) > 280
    assert all(type(row["label"]) is float for row in rows_of(FactPairs()))


def test_who_knows_the_wordings_is_right_and_counting_words_is_not() -> None:
    """Pearson: the facts 1; the share of common words 0.46; a constant, whose mean square error is 2.9, none."""
    rows = rows_of(FactPairs())
    labels = [row["label"] for row in rows]
    shared = [sum(a == b for a, b in zip(facts(row["text"]), facts(row["text_pair"]), strict=True)) for row in rows]
    assert shared == labels
    words = [overlap(row["text"], row["text_pair"]) for row in rows]
    assert np.corrcoef(words, labels)[0, 1] < 0.55
    assert np.var(labels) > 2.5
