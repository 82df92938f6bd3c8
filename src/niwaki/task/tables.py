"""Scores of each class beside the averages over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def class_scores(true: Any, found: Any, labels: Sequence[str], *, several: bool = False) -> dict[str, Any]:
    """`per_class`: precision, recall, f1 and support of each label, in this order; `averages`: micro (of one label each
    the accuracy), macro and weighted.

    `true` and `found`: a label for each of as many positions; where there may be `several`, arrays (rows, labels) of
    ones and zeros.
    """
    from sklearn.metrics import precision_recall_fscore_support

    names = ("precision", "recall", "f1", "support")

    def scored(average: str | None) -> tuple[Any, ...]:
        found_by: tuple[Any, ...] = precision_recall_fscore_support(
            true, found, labels=None if several else list(labels), average=average, zero_division=0
        )
        return found_by

    each = dict(zip(labels, zip(*scored(None), strict=True), strict=True))
    total = sum(row[-1] for row in each.values())
    averages = {average: (*scored(average)[:3], total) for average in ("micro", "macro", "weighted")}
    if not several:  # what is found may be none of the labels
        hits = sum(one == other for one, other in zip(true, found, strict=True)) / len(true)
        averages["micro"] = (hits, hits, hits, len(true))

    def named(table: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {key: dict(zip(names, map(float, row), strict=True)) for key, row in table.items()}

    return {"per_class": named(each), "averages": named(averages)}
