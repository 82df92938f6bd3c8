"""Classification of a text or of a pair of texts, one label each (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from niwaki.data.columns import labels_of
from niwaki.data.source import Needs
from niwaki.errors import DataError
from niwaki.task.headed import Headed
from niwaki.task.tables import class_scores
from niwaki.task.task import UNKNOWN, Batch, Rows, Scores, alike


@dataclass(frozen=True, kw_only=True)
class Classification(Headed):
    """softmax(head(text)); accuracy, macro F1, Matthews correlation, calibration error, and a table per class.
    `watched`: the score by which the best step of a fit is told, such as mcc for CoLA."""

    needs: ClassVar[Needs] = Needs(required=("text", "label"), optional=("text_pair",))
    paper: ClassVar[str] = "Devlin et al. 2019, arXiv:1810.04805"

    watched: Literal["accuracy", "f1", "mcc"] = "accuracy"
    pattern: str | None = None
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    against_contradiction: bool | None = None
    demonstrations: int | None = None
    calibrate: bool | None = None
    lr: float = 1e-4

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.watched

    def labels(self, splits: Mapping[str, Any]) -> tuple[str, ...]:
        labels = tuple(labels_of(dict(splits), "label"))
        if len(labels) < 2:
            raise DataError(f"data.train: has the one label {labels[0]!r}; a classification needs at least two")
        self.chosen.check_labels(labels)
        return labels

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        encoded = self.chosen.encode(rows, tokenizer, labels)
        if "label" in rows:
            index: dict[str | None, int] = {None: UNKNOWN, **{label: i for i, label in enumerate(labels)}}
            encoded["labels"] = [index[label] for label in rows["label"]]
        return encoded

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = super().collate(features, tokenizer)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in features])
        return batch

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return outputs.logits, batch["labels"]

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return ClassScores(labels)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in alike(rows):
            for row, chances in zip(part, self.said(model, tokenizer, labels, part).softmax(-1), strict=True):
                best = int(chances.argmax())
                spread = {label: round(float(p), 4) for label, p in zip(labels, chances, strict=True)}
                yield {**row, "label": labels[best], "score": round(float(chances[best]), 4), "scores": spread}


class ClassScores(Scores):
    """accuracy, f1 (macro), mcc, ece and mean loss, from torchmetrics. ece: the expected calibration error, sum over 15
    bins of |accuracy - confidence| weighed by their share of the rows (Guo et al. 2017, arXiv:1706.04599)."""

    def __init__(self, labels: Sequence[str]) -> None:
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassCalibrationError,
            MulticlassF1Score,
            MulticlassMatthewsCorrCoef,
        )

        classes = len(labels)
        self._labels = list(labels)
        self._true: list[int] = []
        self._found: list[int] = []
        self._loss = MeanMetric()
        self._calibration = MulticlassCalibrationError(classes, n_bins=15)
        self._metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
                "mcc": MulticlassMatthewsCorrCoef(classes),
            }
        )

    def update(self, outputs: Any, batch: Batch) -> None:
        logits, labels = outputs.logits.float().cpu(), batch["labels"].cpu()
        self._metrics.update(logits.argmax(-1), labels)
        self._true += labels.tolist()
        self._found += logits.argmax(-1).tolist()
        self._calibration.update(logits.softmax(-1), labels)
        self._loss.update(torch.nn.functional.cross_entropy(logits, labels), weight=len(labels))

    def compute(self) -> dict[str, float]:
        found = {name: float(value) for name, value in self._metrics.compute().items()}
        return {**found, "ece": float(self._calibration.compute()), "loss": float(self._loss.compute())}

    def report(self) -> dict[str, Any]:
        true, found = ([self._labels[i] for i in places] for places in (self._true, self._found))
        return class_scores(true, found, self._labels)
