"""Relation extraction: the directed relation of two entities that are marked in a text (Baldini Soares et al. 2019,
arXiv:1906.03158; Hendrickx et al. 2010)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from niwaki.data.columns import check_marked, labels_of
from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError, nearest
from niwaki.model.load import CAUSAL
from niwaki.task.task import UNKNOWN, Batch, Rows, Scores, Task, batched, pad
from niwaki.task.texts import columns_of, rows_of

MARKS = re.compile(r"(<e1>|</e1>|<e2>|</e2>)")
DIRECTED = re.compile(r"(.+)\((e1,e2|e2,e1)\)")


@dataclass(frozen=True, kw_only=True)
class Relation(Task):
    """softmax(W [h_e1; h_e2] + b): h_e1 and h_e2 are the states at the marks that open the two entities; of a model
    that reads from left to right at those that close them, before which it has read them.

    The head is that of token classification with two outputs a label: the first half of them is read at <e1>, the other
    at <e2>, and the sum of both is the linear of the concatenation. `marks`: what stands around the first entity and
    the second in place of <e1> and <e2>, a token that the model knows already (Wu & He 2019, arXiv:1905.08284), so the
    embeddings stay as they are. A text that is too long is cut on both sides of its entities.
    `other`: the label that f1 leaves out; null: none.
    """

    needs: ClassVar[Needs] = Needs(required=("text", "label"), checks={"text": check_marked})
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    as_headed: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing", "other")
    paper: ClassVar[str] = "Baldini Soares et al. 2019, arXiv:1906.03158; Hendrickx et al. 2010"

    marks: Sequence[str] = ("$", "#")
    other: str | None = "Other"
    epochs: int = 5
    lr: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.marks) != 2 or not all(mark.strip() for mark in self.marks) or self.marks[0] == self.marks[1]:
            raise ConfigError(f"task.marks={list(self.marks)}: needs two different marks, such as ['$', '#']")

    def labels(self, splits: Mapping[str, Any]) -> tuple[str, ...]:
        labels = tuple(labels_of(dict(splits), "label"))
        if len(labels) < 2:
            raise DataError(f"data.train: has the one label {labels[0]!r}; relation needs at least two")
        if self.other is not None and self.other not in labels:
            raise ConfigError(
                f"task.other={self.other!r}: is none of the {len(labels)} labels, of which the nearest is "
                f"{nearest(self.other, labels)!r}; null counts all of them"
            )
        return labels

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return [f"{label} {mark}" for mark in ("e1", "e2") for label in labels]

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        encoded = self._tokenize(rows["text"], tokenizer)
        if "label" in rows:
            index: dict[str | None, int] = {None: UNKNOWN, **{label: i for i, label in enumerate(labels)}}
            encoded["labels"] = [index[label] for label in rows["label"]]
        return encoded

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        batch = pad(features, tokenizer)
        names = ("marks", "labels") if "labels" in features[0] else ("marks",)
        return batch | {name: torch.tensor([row[name] for row in features]) for name in names}

    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.predictions(outputs, batch), batch["labels"]

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows, labels)."""
        rows = torch.arange(len(batch["marks"]), device=outputs.logits.device)
        first, second = (outputs.logits[rows, places] for places in batch["marks"].T)
        half = first.shape[-1] // 2
        found: Tensor = first[:, :half] + second[:, half:]
        return found

    def owners(self, outputs: Any, batch: Batch) -> Tensor:
        return torch.arange(len(batch["marks"]), device=batch["marks"].device)

    def equip(self, tokenizer: Any) -> None:
        """Raise ConfigError for marks that the tokenizer does not tell apart."""
        first = [tokenizer(mark.strip(), add_special_tokens=False)["input_ids"][:1] for mark in self.marks]
        if not all(first) or first[0] == first[1] or [tokenizer.unk_token_id] in first:
            raise ConfigError(
                f"task.marks={list(self.marks)}: the tokenizer does not know them, or does not tell them apart; needs "
                "two signs that it knows, such as ['$', '#'] or ['@', '^']"
            )

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        return RelationScores(labels, self)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        for part in batched(rows):
            encoded = self._tokenize(columns_of(part)["text"], tokenizer)
            features = rows_of(encoded)
            batch = {name: value.to(model.device) for name, value in self.collate(features, tokenizer).items()}
            found = self.predictions(model(**self.inputs(batch)), batch).float().softmax(-1)
            for row, chances in zip(part, found, strict=True):
                best = int(chances.argmax())
                spread = {label: round(float(p), 4) for label, p in zip(labels, chances, strict=True)}
                yield {
                    **row, **directed(row["text"], labels[best]), "label": labels[best],
                    "score": round(float(chances[best]), 4), "scores": spread,
                }  # fmt: skip

    def _tokenize(self, texts: Sequence[str], tokenizer: Any) -> Rows:
        marked = [remarked(text, self.marks) for text in texts]
        read = [text for text, _ in marked]
        whole = tokenizer(read, return_offsets_mapping=True, truncation=False, verbose=False)
        ids, marks = [], []
        for text, (_, at), row, offsets in zip(texts, marked, whole["input_ids"], whole["offset_mapping"], strict=True):
            places = [place_of(at[mark], offsets) for mark in ("<e1>", "<e2>")]
            ends = [place_of(at[mark], offsets) for mark in ("</e1>", "</e2>")]
            special = tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
            kept = window(len(row), min(places), max(ends), special, self.max_length)
            if kept is None:
                raise DataError(
                    f"text {text[:40]!r}: its two entities are {max(ends) - min(places) + 1} tokens apart, and "
                    f"task.max_length={self.max_length} has no room for them; set it higher"
                )
            ids.append([row[i] for i in kept])
            marks.append([kept.index(place) for place in (ends if CAUSAL in tokenizer.init_kwargs else places)])
        return {"input_ids": ids, "marks": marks, "length": [len(row) for row in ids]}


def remarked(text: str, marks: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The text with other marks, each between blanks; and where each of them begins, by what it stands for."""
    written, places = "", {}
    for piece in MARKS.split(text):
        if MARKS.fullmatch(piece) is None:
            written += piece
            continue
        written += "" if not written or written[-1].isspace() else " "
        places[piece] = len(written)
        written += f"{marks[piece.endswith('2>')].strip()} "
    return written, places


def place_of(character: int, offsets: Sequence[tuple[int, int]]) -> int:
    """The token that holds a character of the text."""
    return next(i for i, (start, end) in enumerate(offsets) if start <= character < end)


def window(count: int, first: int, last: int, special: Sequence[int], most: int) -> list[int] | None:
    """The numbers of at most `most` of `count` tokens that stay: all special ones, those from `first` to `last`, and as
    many on both sides of them as there is room for, alike as far as there are so many; None where there is none."""
    inner = [i for i in range(count) if not special[i]]
    room = most - (count - len(inner)) - (last - first + 1)
    if room < 0:
        return None
    before, behind = [i for i in inner if i < first], [i for i in inner if i > last]
    left = min(len(before), max(room // 2, room - len(behind)))
    stay = {*before[len(before) - left :], *behind[: room - left], *range(first, last + 1)}
    return [i for i in range(count) if special[i] or i in stay]


def directed(text: str, label: str) -> dict[str, str]:
    """The two entities in the order of the relation, and its plain name: `{"head", "relation", "tail"}`; for a relation
    without a direction, in the order of their marks."""
    first, second = (
        MARKS.sub("", text[text.index(f"<{mark}>") : text.index(f"</{mark}>")]).strip() for mark in ("e1", "e2")
    )
    match = DIRECTED.fullmatch(label)
    swapped = match is not None and match[2] == "e2,e1"
    return {
        "head": second if swapped else first,
        "relation": match[1] if match else label,
        "tail": first if swapped else second,
    }


class RelationScores(Scores):
    """f1 as SemEval-2010 Task 8 has it officially (Hendrickx et al. 2010): the mean of F1 over the relations that are
    true of some row, but `other`. A prediction is right where relation and direction are; both directions of a relation
    count together, in what is predicted and in what is true. `accuracy` is over all labels, `other` and directions
    included."""

    def __init__(self, labels: Sequence[str], task: Relation) -> None:
        self._labels = list(labels)
        self._task = task
        self._found: list[int] = []
        self._true: list[int] = []
        self._loss = 0.0

    def update(self, outputs: Any, batch: Batch) -> None:
        logits = self._task.predictions(outputs, batch).float()
        self._loss += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        self._found += logits.argmax(-1).tolist()
        self._true += batch["labels"].tolist()

    def compute(self) -> dict[str, float]:
        found, true = ([self._labels[i] for i in given] for given in (self._found, self._true))
        rows = [row for row in per_relation(found, true, self._task.other).values() if row["support"]]
        hits = sum(one == other for one, other in zip(found, true, strict=True))
        return {
            **{name: sum(row[name] for row in rows) / max(len(rows), 1) for name in ("f1", "precision", "recall")},
            "accuracy": hits / len(true),
            "loss": self._loss / len(true),
        }

    def report(self) -> dict[str, Any]:
        found, true = ([self._labels[i] for i in given] for given in (self._found, self._true))
        return {"per_class": per_relation(found, true, self._task.other)}


def per_relation(found: Sequence[str], true: Sequence[str], other: str | None) -> dict[str, dict[str, float]]:
    """Precision, recall, F1, support and how often it was predicted, of each relation but `other`, its two directions
    as one; right is only what has the right direction."""
    names = sorted({plain(label) for label in (*found, *true)} - {other})
    table = {}
    for name in names:
        right = sum(a == b and plain(a) == name for a, b in zip(found, true, strict=True))
        predicted, support = (sum(plain(label) == name for label in given) for given in (found, true))
        precision, recall = right / max(predicted, 1), right / max(support, 1)
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        table[name] = {
            "precision": precision, "recall": recall, "f1": f1, "support": float(support), "predicted": float(predicted)
        }  # fmt: skip
    return table


def plain(label: str) -> str:
    """A relation without its direction."""
    match = DIRECTED.fullmatch(label)
    return match[1] if match else label
