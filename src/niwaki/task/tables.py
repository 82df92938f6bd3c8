"""Scores of each class beside the averages over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def class_scores(true: Any, found: Any, labels: Sequence[str]) -> dict[str, Any]:
    """`per_class`: precision, recall, f1 and support of each label, in this order; `averages`: micro (of one label each
    the accuracy), macro and weighted.

    `true` and `found`: a label for each of as many positions, or of several labels each an array (rows, labels) of ones
    and zeros.
    """
    from sklearn.metrics import precision_recall_fscore_support

    names = ("precision", "recall", "f1", "support")
    several = np.ndim(true) == 2

    def scored(average: str | None) -> tuple[Any, ...]:
        found_by: tuple[Any, ...] = precision_recall_fscore_support(
            true, found, labels=None if several else list(labels), average=average, zero_division=0
        )
        return found_by

    each = {label: row for label, row in zip(labels, zip(*scored(None), strict=True), strict=True)}
    total = sum(row[-1] for row in each.values())
    averages = {average: (*scored(average)[:3], total) for average in ("micro", "macro", "weighted")}

    def named(table: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {key: dict(zip(names, map(float, row), strict=True)) for key, row in table.items()}

    return {"per_class": named(each), "averages": named(averages)}
