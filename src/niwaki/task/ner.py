"""Named-entity recognition as token classification: IOB2 tags on words, predicted at each word's first piece
(Devlin et al. 2019, arXiv:1810.04805, section 5.3)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from niwaki.data.columns import labels_of
from niwaki.data.source import Needs
from niwaki.task.task import IGNORED, UNKNOWN, Batch, Rows, Scores, Task, batched, pad

WORD = re.compile(r"\w(?:[\w.'’&/-]*\w)?|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class NER(Task):
    """Entity-level precision, recall, f1 (seqeval), and a table per tag over all words, those cut off included."""

    needs: ClassVar[Needs] = Needs(required=("tokens", "tags"), asks=("text",))
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    paper: ClassVar[str] = "Devlin et al. 2019, arXiv:1810.04805"

    max_length: int = 256

    def labels(self, splits: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(labels_of(dict(splits), "tags"))

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        encoded = self._tokenize(rows["tokens"], tokenizer)
        index = {label: i for i, label in enumerate(labels)}
        tags = [
            [UNKNOWN] * len(words) if row is None else [index[tag] for tag in row]
            for words, row in zip(rows["tokens"], rows["tags"], strict=True)
        ]
        firsts = [first_pieces(encoded.word_ids(i)) for i in range(len(tags))]
        seen = [set(words) for words in firsts]
        return {
            "input_ids": encoded["input_ids"],
            "labels": [
                [row[word] if word is not None else IGNORED for word in words]
                for row, words in zip(tags, firsts, strict=True)
            ],
            "words": [[IGNORED if word is None else word for word in words] for words in firsts],
            "cut": [[t for i, t in enumerate(row) if i not in words] for row, words in zip(tags, seen, strict=True)],
            "length": [len(ids) for ids in encoded["input_ids"]],
        }

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = pad(features, tokenizer, labels=True)
        for name in ("words", "cut"):
            width = max(len(row[name]) for row in features)
            batch[name] = torch.tensor([[*row[name], *[IGNORED] * (width - len(row[name]))] for row in features])
        return batch

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = batch["labels"] != IGNORED
        return outputs.logits[keep], batch["labels"][keep]

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return TagScores(labels)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in batched(rows):
            spans = [[match.span() for match in WORD.finditer(row["text"])] or [(0, 0)] for row in part]
            words = [[row["text"][a:b] for a, b in places] for row, places in zip(part, spans, strict=True)]
            encoded = self._tokenize(words, tokenizer)
            features = [{"input_ids": ids} for ids in encoded["input_ids"]]
            batch = {k: v.to(model.device) for k, v in pad(features, tokenizer).items()}
            chances = model(**self.inputs(batch)).logits.float().softmax(-1)
            for i, row in enumerate(part):
                places = [(t, w) for t, w in enumerate(first_pieces(encoded.word_ids(i))) if w is not None]
                tags = [labels[int(chances[i, t].argmax())] for t, _ in places]
                sure = [float(chances[i, t].max()) for t, _ in places]
                yield {**row, "entities": entities(row["text"], tags, [spans[i][w] for _, w in places], sure)}

    def _tokenize(self, words: list[list[str]], tokenizer: Any) -> Any:
        if lacks_space(tokenizer):
            words = [[f" {word}" for word in row] for row in words]
        return tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)


def lacks_space(tokenizer: Any) -> bool:
    """Whether a word given alone is encoded as if it stood behind another without a space, as byte-level tokenizers do
    (GPT-2, RoBERTa, Llama 3) unless they were made with add_prefix_space, and some SentencePiece ones."""
    state = tokenizer.backend_tokenizer.pre_tokenizer
    step = json.loads(state.__getstate__()) if state else {}
    steps = step.get("pretokenizers", [step])
    return any(
        step.get("add_prefix_space") is False if step.get("type") == "ByteLevel" else
        step.get("type") == "Metaspace" and step.get("prepend_scheme") != "always"
        for step in steps
    )  # fmt: skip


def first_pieces(word_ids: Sequence[int | None]) -> list[int | None]:
    """The word index at each word's first piece, None elsewhere."""
    seen: set[int | None] = {None}
    return [None if word in seen or seen.add(word) else word for word in word_ids]  # type: ignore[func-returns-value]


def entities(
    text: str, tags: Sequence[str], spans: Sequence[tuple[int, int]], sure: Sequence[float]
) -> list[dict[str, Any]]:
    """Join IOB2 tags to entities with character offsets; the score is the mean chance of its words."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [
        {
            "entity": kind,
            "text": text[spans[first][0] : spans[last][1]],
            "start": spans[first][0],
            "end": spans[last][1],
            "score": round(sum(sure[first : last + 1]) / (last + 1 - first), 4),
        }
        for kind, first, last in get_entities(list(tags))
    ]


class TagScores(Scores):
    """Entity scores by seqeval, and precision, recall, F1 and support of every tag. A word that was cut off by
    `max_length`, or has no piece at all, counts as predicted O; `loss` is the mean over the others."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)
        self._true: list[list[str]] = []
        self._predicted: list[list[str]] = []
        self._loss = 0.0
        self._seen = 0

    def update(self, outputs: Any, batch: Batch) -> None:
        keep = batch["labels"] != IGNORED
        logits = outputs.logits[keep].float()
        self._loss += float(functional.cross_entropy(logits, batch["labels"][keep], reduction="sum"))
        self._seen += len(logits)
        labels, guesses = torch.stack([batch["labels"], outputs.logits.argmax(-1)]).tolist()
        for row, guess, cut in zip(labels, guesses, batch["cut"].tolist(), strict=True):
            lost = [self._labels[i] for i in cut if i != IGNORED]
            seen = [(self._labels[i], self._labels[j]) for i, j in zip(row, guess, strict=True) if i != IGNORED]
            self._true.append([true for true, _ in seen] + lost)
            self._predicted.append([predicted for _, predicted in seen] + ["O"] * len(lost))

    def compute(self) -> dict[str, float]:
        from seqeval.metrics import f1_score, precision_score, recall_score

        words = sum(len(row) for row in self._true)
        hits = sum(t == p for a, b in zip(self._true, self._predicted, strict=True) for t, p in zip(a, b, strict=True))
        return {
            "f1": float(f1_score(self._true, self._predicted, zero_division=0)),
            "precision": float(precision_score(self._true, self._predicted, zero_division=0)),
            "recall": float(recall_score(self._true, self._predicted, zero_division=0)),
            "accuracy": hits / words,
            "loss": self._loss / self._seen,
        }

    def report(self) -> dict[str, Any]:
        from sklearn.metrics import classification_report

        flat_true = [tag for row in self._true for tag in row]
        flat_predicted = [tag for row in self._predicted for tag in row]
        table: Any = classification_report(
            flat_true, flat_predicted, labels=self._labels, output_dict=True, zero_division=0
        )
        rename = {"f1-score": "f1"}
        clean = {
            name: {rename.get(k, k): float(v) for k, v in row.items()}
            for name, row in table.items()
            if isinstance(row, dict)
        }
        accuracy = sum(t == p for t, p in zip(flat_true, flat_predicted, strict=True)) / len(flat_true)
        micro = {"precision": accuracy, "recall": accuracy, "f1": accuracy, "support": float(len(flat_true))}
        averages = {"micro": micro, "macro": clean["macro avg"], "weighted": clean["weighted avg"]}
        return {"per_class": {name: clean[name] for name in self._labels}, "averages": averages}
