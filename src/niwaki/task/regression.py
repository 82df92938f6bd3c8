"""Regression of a number on a text or a pair of texts, such as how alike two sentences are (Cer et al. 2017,
arXiv:1708.00055)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.columns import check_number
from niwaki.data.source import Needs
from niwaki.errors import ConfigError
from niwaki.task.task import Batch, Rows, Scores, Task, alike, pad
from niwaki.task.texts import batch_of, columns_of, tokenized


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Mean squared error of head(pooled text), in the squared unit of the labels; Pearson and Spearman correlation."""

    needs: ClassVar[Needs] = Needs(required=("text", "label"), optional=("text_pair",), checks={"label": check_number})
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "pearson"
    paper: ClassVar[str] = "Cer et al. 2017, arXiv:1708.00055"

    epochs: int = 5
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing:
            raise ConfigError(f"task.label_smoothing={self.label_smoothing}: has no effect on a number; leave it 0")

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return ("score",)

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        encoded = tokenized(rows, tokenizer, self.max_length)
        if "label" in rows:
            encoded["labels"] = [math.nan if number is None else number for number in rows["label"]]
        return encoded

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = pad(features, tokenizer)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in features], dtype=torch.float32)
        return batch

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return outputs.logits, batch["labels"]

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        known = ~batch["labels"].isnan()  # a row without an answer has none
        errors = (outputs.logits.float().squeeze(-1) - batch["labels"]).square()
        return errors.where(known, 0.0).sum() / known.sum().clamp(min=1)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return Correlations()

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in alike(rows):
            batch = batch_of(tokenized(columns_of(part), tokenizer, self.max_length), tokenizer, model.device)
            found = model(**self.inputs(batch)).logits.float().squeeze(-1).tolist()
            for row, score in zip(part, found, strict=True):
                yield {**row, "label": round(score, 4)}


class Correlations(Scores):
    """pearson and spearman in -1..1, and the root of the mean squared error, in the unit of the labels. Of predictions
    or labels that are all the same, both are 0: nothing is told apart."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, outputs: Any, batch: Batch) -> None:
        self._found.append(outputs.logits.detach().double().squeeze(-1).cpu())
        self._labels.append(batch["labels"].double().cpu())

    def compute(self) -> dict[str, float]:
        from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

        found, labels = torch.cat(self._found), torch.cat(self._labels)
        loss = float(functional.mse_loss(found, labels))
        varied = len(found) > 1 and bool(found.std() > 0) and bool(labels.std() > 0)
        return {
            "pearson": float(pearson_corrcoef(found, labels)) if varied else 0.0,
            "spearman": float(spearman_corrcoef(found, labels)) if varied else 0.0,
            "rmse": loss**0.5,
            "loss": loss,
        }
