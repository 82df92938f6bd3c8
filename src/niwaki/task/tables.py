"""Scores of each class beside the averages over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def class_scores(true: Sequence[Any], found: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """`per_class`: precision, recall, f1 and support of each label, in this order; `averages`: micro (of one label each
    the accuracy), macro and weighted. `true` and `found` hold labels, of as many positions."""
    from sklearn.metrics import precision_recall_fscore_support

    names = ("precision", "recall", "f1", "support")
    total = float(len(true))

    def scored(average: str | None) -> tuple[Any, ...]:
        found_by: tuple[Any, ...] = precision_recall_fscore_support(
            true, found, labels=list(labels), average=average, zero_division=0
        )
        return found_by

    each = zip(*scored(None), strict=True)
    hits = sum(one == other for one, other in zip(true, found, strict=True)) / len(true)
    averages = {"micro": (hits, hits, hits), "macro": scored("macro")[:3], "weighted": scored("weighted")[:3]}
    return {
        "per_class": {
            label: dict(zip(names, map(float, row), strict=True)) for label, row in zip(labels, each, strict=True)
        },
        "averages": {name: dict(zip(names, (*map(float, row), total), strict=True)) for name, row in averages.items()},
    }
