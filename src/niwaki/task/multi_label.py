"""Classification of a text, or of a pair, with any number of labels each: one yes or no per label (Tsoumakas & Katakis
2007)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.columns import labels_of
from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError
from niwaki.task.headed import Headed
from niwaki.task.tables import class_scores
from niwaki.task.task import Batch, Rows, Scores, alike


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Headed):
    """p(label | text) = sigmoid(head(text)), binary cross-entropy, the mean over rows and labels. A label
    is given where its chance is above `threshold`."""

    needs: ClassVar[Needs] = Needs(required=("text", "labels"), optional=("text_pair",))
    metric: ClassVar[str] = "micro_f1"
    as_headed: ClassVar[bool] = False
    several: ClassVar[bool] = True
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", "threshold")
    paper: ClassVar[str] = "Tsoumakas & Katakis 2007"

    threshold: float = 0.5
    epochs: int = 5
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ConfigError(f"task.threshold={self.threshold}: needs a number above 0 and below 1")

    def labels(self, splits: Mapping[str, Any]) -> tuple[str, ...]:
        labels = tuple(labels_of(dict(splits), "labels"))
        if len(labels) < 2:
            raise DataError(
                f"data.train: has the labels {', '.join(labels) or 'of no row'}; multi_label needs two at least; of "
                "one label task=classification says yes or no"
            )
        self.chosen.check_labels(labels)
        return labels

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        encoded = self.chosen.encode(rows, tokenizer, labels)
        if "labels" in rows:
            encoded["labels"] = [[int(label in given) for label in labels] for given in rows["labels"]]
        return encoded

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = super().collate(features, tokenizer)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in features])
        return batch

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.predictions(outputs, batch), batch["labels"].flatten()

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows * labels, 2): the softmax of 0 and z is the sigmoid of z and its rest."""
        yes = outputs.logits.flatten()
        return torch.stack([torch.zeros_like(yes), yes], -1)

    def owners(self, outputs: Any, batch: Batch) -> Tensor:
        rows, labels = outputs.logits.shape
        return torch.arange(rows, device=outputs.logits.device).repeat_interleave(labels)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return LabelScores(labels, self.threshold)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in alike(rows):
            said = self.said(model, tokenizer, labels, part).sigmoid().tolist()
            for row, chances in zip(part, said, strict=True):
                spread = {label: round(chance, 4) for label, chance in zip(labels, chances, strict=True)}
                given = [label for label, chance in zip(labels, chances, strict=True) if chance > self.threshold]
                yield {**row, "labels": given, "scores": spread}


class LabelScores(Scores):
    """micro_f1 over all decisions, macro_f1 over labels, exact_match (rows without any wrong decision), and
    average_precision (macro, over labels that some row has), which needs no threshold. Precision, recall, F1 of every
    label."""

    def __init__(self, labels: Sequence[str], threshold: float) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score

        count = len(labels)
        self._labels = list(labels)
        self._threshold = threshold
        self._found: list[Tensor] = []
        self._true: list[Tensor] = []
        self._metrics = MetricCollection(
            {
                "micro_f1": MultilabelF1Score(count, threshold=threshold, average="micro"),
                "macro_f1": MultilabelF1Score(count, threshold=threshold, average="macro"),
                "exact_match": MultilabelExactMatch(count, threshold=threshold),
            },
            compute_groups=False,
        )

    def update(self, outputs: Any, batch: Batch) -> None:
        self._found.append(outputs.logits.detach().float().cpu())
        self._true.append(batch["labels"].cpu())

    def compute(self) -> dict[str, float]:
        from sklearn.metrics import average_precision_score

        logits, true = torch.cat(self._found), torch.cat(self._true)
        found = self._metrics(logits.sigmoid(), true)
        there = true.any(0)  # of a label that no row has, nothing can be ranked first
        ranked = average_precision_score(true[:, there], logits[:, there]) if there.any() else 0.0
        loss = functional.binary_cross_entropy_with_logits(logits, true.float())
        others = {"average_precision": float(ranked), "loss": float(loss)}
        return {name: float(value) for name, value in found.items()} | others

    def report(self) -> dict[str, Any]:
        given = torch.cat(self._found).sigmoid() > self._threshold
        return class_scores(torch.cat(self._true).int().numpy(), given.int().numpy(), self._labels, several=True)
