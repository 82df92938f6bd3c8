"""Multiple choice: which of some answers to a question is right (Radford et al. 2018; Talmor et al. 2019,
arXiv:1811.00937)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.columns import check_index
from niwaki.data.source import Needs
from niwaki.task.some import NEVER, cross_entropy
from niwaki.task.task import UNKNOWN, Batch, Rows, Scores, Task, batched, pad
from niwaki.task.texts import rows_of


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """softmax over a row's choices of head(pooled(question, choice)), a head with one output. Rows may have different
    numbers of choices. `max_length`: tokens of a question with one choice."""

    needs: ClassVar[Needs] = Needs(required=("question", "choices", "label"), checks={"label": check_index})
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "accuracy"
    as_headed: ClassVar[bool] = False
    paper: ClassVar[str] = "Radford et al. 2018; Talmor et al. 2019, arXiv:1811.00937"

    epochs: int = 5
    lr: float = 1e-4
    batch_size: int = 16

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return ("right",)

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        counts = [len(choices) for choices in rows["choices"]]
        questions = [question for question, count in zip(rows["question"], counts, strict=True) for _ in range(count)]
        choices = [choice for row in rows["choices"] for choice in row]
        encoded = tokenizer(questions, choices, truncation=True, max_length=self.max_length)
        encoded.pop("attention_mask", None)
        found: Rows = {name: parted(values, counts) for name, values in encoded.items()}
        found["length"] = [sum(map(len, row)) for row in found["input_ids"]]
        return {**found, "labels": [UNKNOWN if n is None else n for n in rows["label"]]} if "label" in rows else found

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """`input_ids` (choices of all rows, tokens); `choices` (rows, most choices): the place of each choice in them,
        -1 where a row has fewer."""
        names = [name for name in ("input_ids", "token_type_ids") if name in features[0]]
        flat = [
            dict(zip(names, one, strict=True)) for row in features for one in zip(*(row[n] for n in names), strict=True)
        ]
        counts = torch.tensor([len(row["input_ids"]) for row in features])
        places = torch.arange(int(counts.max())).expand(len(features), -1)
        starts = counts.cumsum(0) - counts
        batch = pad(flat, tokenizer) | {"choices": (places + starts[:, None]).where(places < counts[:, None], -1)}
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in features])
        return batch

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.predictions(outputs, batch), batch["labels"]

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        return cross_entropy(*self.counted(outputs, batch), smoothing)

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows, most choices)."""
        places = batch["choices"]
        return outputs.logits[:, 0][places.clamp(min=0)].masked_fill(places < 0, NEVER)

    def owners(self, outputs: Any, batch: Batch) -> Tensor:
        return torch.arange(len(batch["choices"]), device=batch["choices"].device)

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return ChoiceScores(self)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in batched(rows, 8):
            encoded = self.encode(
                {name: [row[name] for row in part] for name in ("question", "choices")}, tokenizer, ()
            )
            features = rows_of(encoded)
            batch = {name: value.to(model.device) for name, value in self.collate(features, tokenizer).items()}
            found = self.predictions(model(**self.inputs(batch)), batch).float().softmax(-1)
            for row, chances in zip(part, found, strict=True):
                spread = [round(float(chance), 4) for chance in chances[: len(row["choices"])]]
                best = int(chances.argmax())
                yield {**row, "label": best, "answer": row["choices"][best], "score": spread[best], "scores": spread}


def parted(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """`values` in pieces of these lengths."""
    pieces, start = [], 0
    for count in counts:
        pieces.append(list(values[start : start + count]))
        start += count
    return pieces


class ChoiceScores(Scores):
    """accuracy, what it would be by chance (the mean of one over the number of choices), and mean loss in nats."""

    def __init__(self, task: MultipleChoice) -> None:
        self._task = task
        self._right = self._rows = 0
        self._chance = self._loss = 0.0

    def update(self, outputs: Any, batch: Batch) -> None:
        logits, labels = self._task.counted(outputs, batch)
        self._right += int((logits.argmax(-1) == labels).sum())
        self._rows += len(labels)
        self._chance += float((1 / (batch["choices"] >= 0).sum(-1)).sum())
        self._loss += float(functional.cross_entropy(logits.float(), labels, reduction="sum"))

    def compute(self) -> dict[str, float]:
        sums = {"accuracy": self._right, "chance": self._chance, "loss": self._loss}
        return {name: value / self._rows for name, value in sums.items()}
