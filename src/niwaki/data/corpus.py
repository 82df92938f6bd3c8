"""A task's data, ready for a model: checked rows, labels, tokenizer, encoded features, batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import niwaki
from niwaki.data.batches import Batches
from niwaki.data.encode import encode
from niwaki.data.source import Source
from niwaki.task.task import Task

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Corpus:
    """The three splits of a task's data, encoded with one tokenizer."""

    task: Task
    source: Source
    tokenizer: Any
    labels: tuple[str, ...]
    features: Mapping[str, Dataset]
    seed: int

    @classmethod
    def read(cls, task: Task, source: Source, tokenizer: Any, seed: int) -> Corpus:
        """Rows from `source`, checked and encoded (or taken from the cache).

        Raises:
            DataError: rows, columns or labels that cannot be used.
        """
        splits = source.splits(task.needs, seed)
        labels = task.labels(splits)
        key = f"{niwaki.__version__}\n{task!r}\n{labels}\n{tokenizer_hash(tokenizer)}"
        function = partial(task.encode, tokenizer=tokenizer, labels=labels)
        features = {name: encode(rows, function, key, whole=task.whole) for name, rows in splits.items()}
        return cls(task, source, tokenizer, labels, features, seed)

    def training(self, rank: int = 0, world: int = 1) -> Batches:
        """Shuffled batches of the training split."""
        return self._batches("train", self.source.batch_size, self.seed, rank, world)

    def evaluation(self, split: str, rank: int = 0, world: int = 1) -> Batches:
        """Batches of a split in a fixed order."""
        return self._batches(split, self.source.eval_batch_size, None, rank, world)

    def samples(self, split: str, size: int, count: int) -> list[dict[str, Any]]:
        """`count` batches of `size` rows, in the order of a seeded shuffle: the lengths are those of the data."""
        rows = self.features[split].shuffle(seed=self.seed)
        rows = rows.select(range(min(len(rows), size * count)))
        return [self._collate(list(part)) for part in chunks(list(rows), size) if len(part) == min(size, len(rows))]

    def _batches(self, split: str, size: int, seed: int | None, rank: int, world: int) -> Batches:
        return Batches(
            self.features[split],
            self._collate,
            size,
            seed=seed,
            workers=self.source.workers,
            rank=rank,
            world=world,
        )

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.task.collate(rows, self.tokenizer)


def chunks(rows: list[Any], size: int) -> list[list[Any]]:
    """`rows` in pieces of `size`."""
    iterator = iter(rows)
    return list(iter(lambda: list(islice(iterator, size)), []))


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a tokenizer by its content."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
