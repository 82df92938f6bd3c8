"""A task's data, ready for a model: checked rows, labels, tokenizer, encoded features, batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

import niwaki
from niwaki.data.batches import Batches, ByEpoch
from niwaki.data.encode import content_hash, encode, source_of
from niwaki.data.source import Source
from niwaki.data.tokens import cut
from niwaki.data.unlabelled import with_unlabelled
from niwaki.errors import DataError
from niwaki.task.task import STARTS, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """The three splits of a task's data, encoded with one tokenizer."""

    task: Task
    source: Source
    tokenizer: Any
    labels: tuple[str, ...]
    features: Mapping[str, Dataset]
    seed: int
    columns: tuple[str, ...] = ()  # of the rows
    rows: Mapping[str, Dataset] = field(default_factory=dict)  # before they were encoded
    unlabelled: int = 0  # rows at the end of the training split that have no answer
    tokens: tuple[int, ...] = ()  # those that were kept of the tokenizer of `whole`, where some were left out
    whole: Corpus | None = None

    @classmethod
    def read(cls, task: Task, source: Source, tokenizer: Any, seed: int) -> Corpus:
        """Rows from `source`, checked and encoded (or taken from the cache).

        Raises:
            DataError: rows, columns or labels that cannot be used.
        """
        task.equip(tokenizer)
        splits = source.splits(task.needs, seed)
        labels = task.labels(splits)
        if source.shots == 0:  # the labels are known all the same
            splits["train"] = splits["train"].select([])
        train = with_unlabelled(splits["train"], source, task.needs)
        unlabelled = len(train) - len(splits["train"])
        rows = {**splits, "train": train}
        features = encoded(task, rows, tokenizer, labels)
        return cls(task, source, tokenizer, labels, features, seed, tuple(train.column_names), rows, unlabelled)

    def trimmed(self, tokens: Sequence[int]) -> Corpus:
        """The same rows, read with these tokens of the tokenizer alone, which are numbered anew in their order."""
        tokenizer = cut(self.tokenizer, tokens)
        features = encoded(self.task, self.rows, tokenizer, self.labels)
        return replace(self, tokenizer=tokenizer, features=features, tokens=tuple(tokens), whole=self)

    @property
    def as_loaded(self) -> Corpus:
        """The corpus in the tokens of the model as it was loaded."""
        return self.whole or self

    def token_counts(self, splits: Sequence[str]) -> np.ndarray:
        """How often each token stands in these splits, by its number."""
        tables = [self.features[split].with_format("arrow")[:] for split in splits]
        columns = [table.column(name) for table in tables for name in self.task.token_columns]
        numbers = [leaves(column).to_numpy() for column in columns]
        return np.bincount(np.concatenate(numbers), minlength=len(self.tokenizer))

    def training(self, rank: int = 0, world: int = 1) -> Batches:
        """Shuffled batches of the training split, numbered as those of `numbered`."""
        rows = self.task.epoch(self.features["train"])
        return self._batches("train", self.source.batch_size, self.seed, rank, world, rows)

    def numbered(self) -> Batches:
        """Every row of the training split once, in a fixed order; `row` (rows,) are their numbers in it."""
        return self._batches("train", self.source.eval_batch_size, None, 0, 1)

    def training_key(self) -> str:
        """A digest of the training split as it is encoded, and of the code of the task that makes batches of it."""
        return content_hash(self.features["train"], repr(task_source(self.task)))

    def read_by(self, tokenizer: Any) -> Callable[[Tensor], dict[str, Any]]:
        """(numbers of training rows) -> a batch of the same rows as another tokenizer reads them."""
        source = self.features["train"] if self.task.whole else self.rows["train"]
        key = [niwaki.__version__, encoding_hash(self.task), *map(tokenizer_hash, (self.tokenizer, tokenizer))]
        function = partial(self.task.translate, tokenizer=self.tokenizer, other=tokenizer, labels=self.labels)
        features = encode(source, function, "\n".join(["read by another", str(self.labels), *key]))

        def read(numbers: Tensor) -> dict[str, Any]:
            return self.task.collate(list(features.select(numbers.tolist(), keep_in_memory=True)), tokenizer)

        return read

    def evaluation(self, split: str, rank: int = 0, world: int = 1) -> Batches:
        """Batches of a split in a fixed order."""
        return self._batches(split, self.source.eval_batch_size, None, rank, world)

    def samples(self, split: str, size: int, count: int) -> list[dict[str, Any]]:
        """`count` batches of `size` rows, in the order of a seeded shuffle: the lengths are those of the data."""
        order = np.random.default_rng(self.seed).permutation(len(self.features[split]))
        # In memory: the features are a file of the cache, beside which their order would be written.
        rows = self.features[split].select(order[: size * count], keep_in_memory=True)
        return [self._collate(list(part)) for part in chunks(list(rows), size) if len(part) == min(size, len(rows))]

    def calibration(self, count: int) -> list[dict[str, Any]]:
        """Batches of `count` labelled rows of the training split in all (it may have fewer), drawn with the seed.

        Raises:
            DataError: there is none.
        """
        if len(self.features["train"]) == self.unlabelled:
            raise DataError("data.shots=0: there are no training rows to calibrate on; needs at least 1")
        order = np.random.default_rng(self.seed).permutation(len(self.features["train"]) - self.unlabelled)
        rows = list(self.features["train"].select(order[:count], keep_in_memory=True))
        return [self._collate(part) for part in chunks(rows, self.source.batch_size)]

    def _batches(
        self, split: str, size: int, seed: int | None, rank: int, world: int, rows: Dataset | None = None
    ) -> Batches:
        found = self.features[split] if rows is None else rows
        return Batches(
            found,
            self._collate if seed is None else ByEpoch(self._drawn),
            size,
            seed=seed,
            workers=self.source.workers,
            rank=rank,
            world=world,
            numbered=split == "train" and found is self.features[split],
        )

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.task.collate(rows, self.tokenizer)

    def _drawn(self, rows: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
        drawing = self.seed, epoch
        return self.task.draw(
            [*rows, *self.task.company(rows, self.features["train"], drawing)], self.tokenizer, drawing
        )


def encoded(task: Task, splits: Mapping[str, Dataset], tokenizer: Any, labels: tuple[str, ...]) -> dict[str, Dataset]:
    """The features of each split."""
    key = f"{niwaki.__version__}\n{encoding_hash(task)}\n{labels}\n{tokenizer_hash(tokenizer)}"
    function = partial(task.encode, tokenizer=tokenizer, labels=labels)
    found = {name: encode(rows, function, key, whole=task.whole) for name, rows in splits.items() if len(rows)}
    like = next(iter(found.values()))
    return {name: found[name] if name in found else like.select([], keep_in_memory=True) for name in splits}


def leaves(column: Any) -> Any:
    """The numbers in a column of lists, or of lists of lists."""
    found = column.combine_chunks()
    while "list" in str(found.type):
        found = found.flatten()
    return found


def chunks(rows: list[Any], size: int) -> list[list[Any]]:
    """`rows` in pieces of `size`."""
    iterator = iter(rows)
    return list(iter(lambda: list(islice(iterator, size)), []))


def encoding_hash(task: Task) -> str:
    """Identity of what a task does to rows: the source text of its classes' modules, and the settings that count."""
    settings = {name: value for name, value in asdict(task).items() if name not in (*task.unread, *STARTS)}
    return hashlib.sha256(repr((type(task).__qualname__, task_source(task), settings)).encode()).hexdigest()


def task_source(task: Task) -> dict[str, str]:
    """The source text of the modules of a task's classes."""
    return source_of(task.modules())


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a tokenizer by its content and its special tokens, whatever the last call truncated or padded."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    del content["truncation"], content["padding"]
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    reads_on = tokenizer.init_kwargs.get("reads_on", False)
    ways = (special, tokenizer.truncation_side, tokenizer.model_input_names, tokenizer.split_special_tokens, reads_on)
    told = [content, ways, *filter(None, [tokenizer.chat_template])]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
