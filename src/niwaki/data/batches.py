"""Batches of rows of like length, in an order that can be stopped and gone on with at any batch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from niwaki.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

WINDOW = 50  # batches


class BucketBatches(Sampler[list[int]]):
    """Row numbers of each batch: a pure function of lengths, batch size, seed, epoch, rank and world.

    With a seed the rows are shuffled, sorted by length inside windows of 50 batches, and the batches
    shuffled. Without one (evaluation) the longest rows come first, so that memory runs out at once or not at
    all. Every row occurs exactly once over all ranks; each rank has the same number of batches.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, *, seed: int | None, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be 1 or more")
        if not 0 <= rank < world:
            raise ConfigError(f"rank={rank}: must be at least 0 and below world={world}")
        if 0 < len(lengths) < world:
            raise DataError(f"{len(lengths)} rows for {world} processes: give at least one row to each")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = 0
        self.start = 0
        self.wanted_epoch: int | None = None

    @property
    def sampler(self) -> "BucketBatches":
        """Itself: Lightning looks for `set_epoch` at `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iterator is to serve."""
        self.wanted_epoch = epoch

    def __len__(self) -> int:
        """The batches of this rank in a whole epoch."""
        return -(-len(self.lengths) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches()[self.start :]

    def batches(self) -> list[list[int]]:
        """All batches of this rank in the current epoch."""
        count = len(self) * self.world
        if not count:
            return []
        if self.seed is None:
            order = np.argsort(-self.lengths, kind="stable")
            steps = np.arange(len(self))
        else:
            generator = np.random.default_rng([self.seed, self.epoch])
            order = self._bucketed(generator.permutation(len(self.lengths)))
            steps = generator.permutation(len(self))
        # Neighbours in length go to the ranks of one step: none waits long for another.
        parts = self._cut(order, count)
        return [parts[step * self.world + self.rank].tolist() for step in steps]

    def _bucketed(self, order: np.ndarray) -> np.ndarray:
        size = WINDOW * self.batch_size * self.world
        windows = [order[start : start + size] for start in range(0, len(order), size)]
        return np.concatenate([w[np.argsort(self.lengths[w], kind="stable")] for w in windows])

    def _cut(self, order: np.ndarray, count: int) -> list[np.ndarray]:
        if self.world == 1:
            return [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(count)]
        # Nearly equal parts, so that no rank runs dry before another.
        return np.array_split(order, count)


class Numbered:
    """Rows with their numbers: (number, row)."""

    def __init__(self, dataset: "Dataset") -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: list[int]) -> list[tuple[int, dict[str, Any]]]:
        return list(zip(numbers, self.dataset.__getitems__(numbers), strict=True))


def with_numbers(collate: Callable[[list[dict[str, Any]]], Any], rows: list[tuple[int, dict[str, Any]]]) -> Any:
    """A batch, and the numbers of its rows as `row`."""
    return {**collate([row for _, row in rows]), "row": torch.tensor([number for number, _ in rows])}


class ByEpoch:
    """`collate` of rows and the number of the epoch, for what is drawn anew in each. `Batches` sets the epoch before an
    iterator starts its workers, which take it along; nothing else may tell them where they are, since a batch is made
    before its turn, and a resumed fit has other workers."""

    def __init__(self, collate: Callable[[list[dict[str, Any]], int], Any]) -> None:
        self.collate = collate
        self.epoch = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self.collate(rows, self.epoch)


class Batches(DataLoader):
    """A DataLoader over `BucketBatches` whose state is {epoch, position}: batches served in that epoch.

    `dataset` is read by lists of row numbers; `collate` turns a list of rows (dicts) into a batch, `ByEpoch` perhaps.
    `numbered` adds the numbers of its rows to each batch, as `row`. `seed=None` is the order for evaluation. Lightning
    saves the state in each checkpoint and restores it; a restored loader serves exactly the batches that were left.
    Lightning must run with `use_distributed_sampler=False`. With `max_steps`, save by steps or after validation:
    Lightning 2.6 miscounts after a checkpoint of a training epoch's end.
    """

    batch_sampler: BucketBatches

    def __init__(
        self,
        dataset: "Dataset",
        collate: Callable[[list[dict[str, Any]]], Any],
        batch_size: int,
        *,
        seed: int | None,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        numbered: bool = False,
    ) -> None:
        sampler = BucketBatches(_lengths(dataset), batch_size, seed=seed, rank=rank, world=world)
        super().__init__(
            Numbered(dataset) if numbered else dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=partial(with_numbers, collate) if numbered else collate,
            num_workers=workers,
            # Its own, or each iterator would draw from the generator that dropout draws from.
            generator=torch.Generator(),
        )
        self._by_epoch = collate if isinstance(collate, ByEpoch) else None
        self._position: int | None = None
        self._loaded: tuple[int, int] | None = None

    def __len__(self) -> int:
        """The batches of a whole epoch, also after a resume: Lightning counts the ones before."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: Lightning makes iterators early, some never read, and names the epoch afterwards.
        epoch, position = self._next_start()
        self.batch_sampler.epoch, self.batch_sampler.start = epoch, position
        self._position = position
        if self._by_epoch is not None:
            self._by_epoch.epoch = epoch
        self.generator.manual_seed((self.batch_sampler.seed or 0) + epoch)
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def _next_start(self) -> tuple[int, int]:
        loaded, self._loaded = self._loaded, None
        wanted, self.batch_sampler.wanted_epoch = self.batch_sampler.wanted_epoch, None
        if loaded is not None:
            epoch, position = loaded if loaded[1] < len(self) else (loaded[0] + 1, 0)
            return (epoch, position) if wanted in (None, epoch) else (wanted, 0)
        if wanted is not None:
            return wanted, 0
        return (0 if self._position is None else self.batch_sampler.epoch + 1), 0

    def state_dict(self) -> dict[str, int]:
        if self._loaded is not None:
            return {"epoch": self._loaded[0], "position": self._loaded[1]}
        return {"epoch": self.batch_sampler.epoch, "position": self._position or 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        epoch, position = state["epoch"], state["position"]
        if not 0 <= position <= len(self):
            raise DataError(
                f"batch position {position} of the checkpoint: this data has {len(self)} batches an epoch; "
                f"resume with the data and batch size of the first run"
            )
        self._loaded = (epoch, position)


def _lengths(dataset: "Dataset") -> np.ndarray:
    import pyarrow.compute as compute

    column = "length" if "length" in dataset.column_names else "input_ids"
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    return (values if column == "length" else compute.list_value_length(values)).to_numpy()
