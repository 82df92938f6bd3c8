"""What a task is: a head, the columns it needs, its features, its loss, its scores, and readable answers."""

from __future__ import annotations

import abc
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize

from niwaki.data.source import Needs
from niwaki.errors import ConfigError
from niwaki.model.text import end_tokens
from niwaki.naming import option_name

if TYPE_CHECKING:
    from datasets import Dataset

    from niwaki.data.corpus import Corpus
    from niwaki.model.anatomy import Anatomy
    from niwaki.recipe import Recipe

STARTS = ("epochs", "lr", "batch_size")  # settings of a task that others take up
IGNORED = -100  # the label of a position that does not count
OF_TASKS = __name__.removesuffix("task")  # where their modules stand
UNKNOWN = -1  # of one that counts, in a row without an answer: a teacher says what it is
Batch = Mapping[str, Tensor]
Rows = dict[str, list[Any]]


class Scores(abc.ABC):
    """Gathers the metrics of one pass over a split."""

    @abc.abstractmethod
    def update(self, outputs: Any, batch: Batch) -> None: ...

    @abc.abstractmethod
    def compute(self) -> dict[str, float]:
        """Metric values by their usual names."""

    def report(self) -> dict[str, Any]:
        """What is more than a number (a table per class), for metrics.json."""
        return {}


class LikelihoodScores(Scores):
    """perplexity = exp(loss), loss = mean negative log-likelihood over all positions that count, in nats."""

    def __init__(self) -> None:
        self._total = 0.0
        self._tokens = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Take logits (positions, classes) and targets (positions,), IGNORED where none counts."""
        self._total += float(functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum"))
        self._tokens += int((targets != IGNORED).sum())

    def compute(self) -> dict[str, float]:
        loss = self._total / self._tokens
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """One kind of problem. It holds settings only; labels and tokenizer are handed to it."""

    needs: ClassVar[Needs]
    auto_class: ClassVar[str]  # the transformers class that loads backbone and head
    metric: ClassVar[str]  # the score to watch
    mode: ClassVar[Literal["max", "min"]] = "max"
    head_learns: ClassVar[bool] = True  # it is new
    head_may_be_new: ClassVar[bool] = False  # where a source has none; it is tied to the embeddings, which are not new
    causal: ClassVar[bool] = False  # only a model that reads from left to right can do it
    writes: ClassVar[bool] = False  # texts, by a search over one token after another
    whole: ClassVar[bool] = False  # a split is encoded in one piece rather than row by row
    unit: ClassVar[str] = "rows"  # what a split is counted in, once it is encoded
    as_headed: ClassVar[bool] = True  # its predictions are the outputs of the head, of rows or of tokens
    token_columns: ClassVar[tuple[str, ...]] = ("input_ids",)  # the features that hold tokens
    unread: ClassVar[tuple[str, ...]] = ("label_smoothing",)  # settings that `encode` does not read, beside STARTS
    paper: ClassVar[str] = ""

    max_length: int = 128
    label_smoothing: float = 0.0
    # What a practitioner starts from; the options of trainer, optimizer and data take it where they are told nothing.
    epochs: int = 3
    lr: float = 5e-5
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise ConfigError(f"task.max_length={self.max_length}: needs a whole number of at least 4")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={self.label_smoothing}: needs a number in 0..1, below 1")

    @property
    def name(self) -> str:
        """`classification`: the option that selects this task, which is where its file stands."""
        return option_name(self)

    def auto_class_of(self, config: Any) -> str:
        """The transformers class for a model of this Hugging Face config."""
        return self.auto_class

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        """The outputs of the head, by name: the labels, unless a task reads them otherwise."""
        return labels

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        """Put the task's own head on a model that was just made, where transformers has none for it."""
        return None

    def alike(self, other: Task) -> bool:
        """Whether models of the other task have this one's head, of any labels."""
        return type(other) is type(self)

    def refuse_start(self, other: Task) -> None:
        """Raise ConfigError where a model that was tuned for the other task would no longer read what it did."""
        return None

    def reads_as(self, other: Task) -> bool:
        """Whether the other task makes the same of a text, so that its models can read this one's batches."""
        return type(other) is type(self)

    def modules(self) -> list[str]:
        """The modules whose code decides what becomes of a text."""
        return reached(kind.__module__ for kind in type(self).__mro__ if issubclass(kind, Task))

    def conflict(self, recipe: Recipe) -> str | None:
        """The reason why this task cannot be part of such a run, or None."""
        for stage in () if self.as_headed else recipe.stages:
            given = [f"{name}={value}" for name in ("cache", "top_k") if (value := getattr(stage, name, None))]
            if given:
                return (
                    f"{stage.name} with {given[0]} and task={self.name}: a prediction is put together of several "
                    "outputs of the head, and what is kept is told by these; leave it out"
                )
        return None

    def read_as(self, column: str, value: Any) -> Any:
        """A row's answer in the labels that the task learns."""
        return value

    def begin(self, model: Any, corpus: Corpus) -> None:
        """Write what of the head is computed of a model that was just loaded, rather than learned; in its tokens."""
        return None

    @property
    def refits(self) -> bool:
        """Whether something of the head is computed anew by `refit`, before each validation and after the fit."""
        return False

    def refit(self, model: Any, corpus: Corpus) -> None:
        """Compute what of the head depends on the training rows and on the model as it is now."""
        return None

    def epoch(self, features: Dataset) -> Dataset:
        """The rows of one epoch of the fit, of those of the training split."""
        return features

    def company(
        self, features: Sequence[dict[str, Any]], split: Dataset, drawing: tuple[int, int]
    ) -> list[dict[str, Any]]:
        """Rows of the training split that stand in a batch of the fit behind its own, drawn as in `draw`."""
        return []

    def check_config(self, config: Any) -> None:
        """Raise ConfigError for a Hugging Face config whose models cannot do this task."""
        return None

    def check(self, anatomy: Anatomy) -> None:
        """Raise ConfigError where such a model cannot do this task; it may be empty (meta device)."""
        if self.causal and not anatomy.causal:
            kind = anatomy.model.config.model_type  # type: ignore[union-attr]
            raise ConfigError(
                f"task={self.name}: needs a model that reads from left to right, and {kind} sees the whole text; "
                "try model=tiny-llama, or name a causal model by model=pretrained model.name=..."
            )
        if anatomy.positions is not None and self.max_length > anatomy.positions:
            raise ConfigError(f"task.max_length={self.max_length}: the model reads at most {anatomy.positions} tokens")

    def labels(self, splits: Mapping[str, Any]) -> tuple[str, ...]:
        """The classes, in the order of the head's outputs; empty where there are none."""
        return ()

    def equip(self, tokenizer: Any) -> None:
        """Give a tokenizer what the task needs and it lacks; its files keep that."""
        return None

    @abc.abstractmethod
    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        """Columns of text to columns of features: `input_ids`, `labels`, `length` and what else is needed. A row whose
        answer is None has UNKNOWN where others have a label."""

    def translate(self, rows: Rows, tokenizer: Any, other: Any, labels: Sequence[str]) -> Rows:
        """What `encode` makes of the same rows, one for one, with the tokenizer `other`. `rows` are columns of text, or
        with `whole` the features that `tokenizer` made."""
        return self.encode(rows, other, labels)

    @abc.abstractmethod
    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Rows of features to one padded batch."""

    def draw(self, features: list[dict[str, Any]], tokenizer: Any, drawing: tuple[int, int]) -> dict[str, Tensor]:
        """`collate` of training rows, where a task draws something of them at random: by `drawing` (the run's seed, the
        epoch) and the rows alone, so that neither workers nor where a fit was stopped make a difference."""
        return self.collate(features, tokenizer)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch the model's forward takes."""
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}

    @abc.abstractmethod
    def counted(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (positions, classes) and labels (positions,) of the positions that count; a label may be UNKNOWN."""

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over the positions that count and whose label is known; 0 where there is none."""
        logits, labels = self.counted(outputs, batch)
        total = functional.cross_entropy(
            logits.float(), labels, ignore_index=UNKNOWN, label_smoothing=smoothing, reduction="sum"
        )
        return total / (labels != UNKNOWN).sum().clamp(min=1)

    def predictions(self, outputs: Any, batch: Batch) -> Tensor:
        """Logits (positions, classes) of the positions that count."""
        return self.counted(outputs, batch)[0]

    def owners(self, outputs: Any, batch: Batch) -> Tensor:
        """For each position of `predictions` the row of the batch that it is of; only the outputs' shape counts."""
        shape = outputs.logits.shape
        rows = torch.arange(shape[0], device=outputs.logits.device).view(-1, *[1] * (len(shape) - 1))
        return self.predictions(SimpleNamespace(logits=rows.expand(*shape[:-1], 1)), batch)[:, 0]

    @property
    def writing(self) -> dict[str, Any]:
        """The settings that `write` goes by."""
        return {}

    def write(self, model: Any, batch: Batch, *, num_beams: int) -> Tensor:
        """What a model writes in answer to a batch, in place of its labels: tokens (rows, tokens), IGNORED where there
        are none. Only tasks that write texts do."""
        raise NotImplementedError(f"{self.name} writes nothing")

    def retold(self, batch: Batch, written: Tensor) -> dict[str, Tensor]:
        """The batch with what `write` gave in place of its own answers."""
        raise NotImplementedError(f"{self.name} writes nothing")

    @abc.abstractmethod
    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> Scores:
        """A fresh gatherer of this task's metrics; `tokenizer` for those that read what was written."""

    def score(self, scores: Scores, model: Any, batch: Batch) -> None:
        """Let a model do a batch, and gather how well it did."""
        scores.update(model(**self.inputs(batch)), batch)

    def watch(self, scores: Scores, model: Any, batch: Batch) -> None:
        """`score`, as far as the score to watch needs it: what is done at each validation of a fit."""
        self.score(scores, model, batch)

    @abc.abstractmethod
    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """What the model says of rows with the asked columns of `needs`, one readable dictionary each, in order."""


def reached(modules: Iterable[str]) -> list[str]:
    """Modules, those of tasks that they import something from, and so on."""
    found = list(dict.fromkeys(modules))
    for name in found:
        for value in vars(sys.modules[name]).values():
            other = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            if isinstance(other, str) and other.startswith(OF_TASKS) and other not in found:
                found.append(other)
    return found


def pad(features: list[dict[str, Any]], tokenizer: Any, *, labels: bool = False) -> dict[str, Tensor]:
    """Pad `input_ids` and its companions on the right to the longest row; `labels` (per token) with IGNORED."""
    width = max(len(row["input_ids"]) for row in features)
    fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    if labels:
        fill["labels"] = IGNORED
    for row in features:
        row.setdefault("attention_mask", [1] * len(row["input_ids"]))
    return {
        name: torch.tensor([list(row[name]) + [value] * (width - len(row[name])) for row in features])
        for name, value in fill.items()
        if name in features[0]
    }


def searched(model: Any, ids: Tensor, mask: Tensor, *, num_beams: int, new: int) -> Tensor:
    """The likeliest of `num_beams` texts that a model writes on or in answer to `ids` (rows, tokens), at most `new`
    tokens each; what else steers the search is as the model's own generation_config says."""
    with parametrize.cached():  # chains of links, once for all tokens
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, num_beams=num_beams, do_sample=False, max_new_tokens=new
        )
    return found


def until_end(written: Tensor, model: Any, ends: Tensor | None = None) -> Tensor:
    """Tokens (rows, tokens) that a model wrote, IGNORED behind the first of each row that ends a text: one of `ends`,
    else of the model's own."""
    ended = torch.isin(written, (end_tokens(model) if ends is None else ends).to(written.device)).long()
    return written.masked_fill(ended.cumsum(1) > ended, IGNORED)


def batched(rows: Sequence[Any], size: int = 32) -> Iterator[Sequence[Any]]:
    """`rows` in pieces of `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def alike(rows: Sequence[Mapping[str, Any]], size: int = 32) -> Iterator[Sequence[Mapping[str, Any]]]:
    """`rows` in pieces of `size` at most, in order, each of rows with the same columns: one that lacks an optional
    column is read without it."""
    for _, some in groupby(rows, key=frozenset):
        yield from batched(list(some), size)
