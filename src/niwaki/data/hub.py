"""Rows from the Hugging Face hub, or from any folder that `datasets.load_dataset` reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from niwaki.data.source import SPLITS, Needs, Source
from niwaki.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CARVE = "carve"


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """A data set by its hub name or local folder (`path`), its configuration (`name`) and `revision`.

    `train`, `validation` and `test` are split names there. Null means the split of that very name, carved
    from train where there is none; "carve" carves it even so (for published test sets without labels). A split
    that stands for `train` and for another one too is there to measure with: `shots` has to be 0.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("path", "train"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"data.{field}={value!r}: must be a name")
        for field in ("name", "revision", "validation", "test"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"data.{field}={value!r}: must be a name or null")
        for split in ("validation", "test"):
            if self.train == (getattr(self, split) or split) and self.shots != 0:
                raise ConfigError(
                    f"data.train={self.train} and data.{split}={getattr(self, split)}: a model would be measured with "
                    "rows that it learned from; name another split to train on, or set data.shots=0 to learn nothing"
                )

    def read(self, needs: Needs) -> "dict[str, Dataset]":
        found = self._load()
        rows = {}
        for split in SPLITS:
            name = getattr(self, split)
            if name == CARVE or (name is None and split not in found):
                continue
            if (name or split) not in found:
                raise DataError(
                    f"data.{split}={name}: {self.path!r} has no such split; it has {', '.join(map(str, found))}"
                )
            rows[split] = found[name or split]
        return rows

    def place(self, split: str, number: int, row: dict[str, Any]) -> str:
        return f"{self.origin(split)} row {number}"

    def origin(self, split: str) -> str:
        return f"data.path={self.path} split {getattr(self, split) or split!s}"

    def _load(self) -> "DatasetDict":
        from datasets import DatasetDict, load_dataset

        try:
            with _no_progress_bars():
                found = load_dataset(self.path, name=self.name, revision=self.revision)
        # The loader, the hub client and the network below them share no base of their errors.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            named = f"data.path={self.path}" + (f" data.name={self.name}" if self.name else "")
            raise DataError(f"{named}: cannot be loaded: {reason[:300]}") from error
        assert isinstance(found, DatasetDict)
        return found


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
