"""What a teacher says of every training row: computed once, kept on disk, and read from there without the teacher."""

from __future__ import annotations

import abc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

import niwaki
from niwaki.compression.distill import divergence, states
from niwaki.console import notice
from niwaki.data.encode import cache_folder, source_of
from niwaki.errors import ConfigError
from niwaki.model.teacher import Teacher
from niwaki.stage import Context

LARGEST = 20 * 1024**3  # bytes of all answers together; the oldest go first
SPARE = 1024**3  # bytes that a disk keeps free

Found = TypeVar("Found")


class Remembered(abc.ABC, Generic[Found]):
    """A teacher whose answers to the training rows are looked up: computed in one pass when they are first asked for,
    under the precision of that moment, unless a run has done so before. After that the teacher does not run.

    The name of the file is a digest of the teacher (weights, settings, code), the encoded rows, the precision and what
    is kept, so that another of these has another file. Processes that want the same one wait for the first. `field`:
    the setting that asks for it, for errors.
    """

    def __init__(self, teacher: Teacher, context: Context, field: str) -> None:
        self._teacher: Teacher | None = teacher
        teacher.only_say()
        self._context = context
        self._field = field
        self._found: Found | None = None

    def found(self, batch: Mapping[str, Tensor]) -> Found:
        """The answers, computed now if there are none yet."""
        if self._found is None:
            self._found = self._open(batch["input_ids"].device)
            self.teacher.let_go()
            self._teacher = None
        return self._found

    @property
    def teacher(self) -> Teacher:
        assert self._teacher is not None
        return self._teacher

    @abc.abstractmethod
    def _what(self) -> Any:
        """What is kept, as JSON."""

    @abc.abstractmethod
    def _fill(self, folder: Path, device: torch.device) -> None:
        """Write what the teacher says of all training rows into a folder."""

    @abc.abstractmethod
    def _read(self, folder: Path) -> Found:
        """What `_fill` wrote."""

    def _open(self, device: torch.device) -> Found:
        folder = cache_folder() / "answers"
        path = folder / self._key(device)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.is_dir():
                    notice(f"{self._field}: its teacher answers each training row once; kept in {folder}")
                    self._write(path, device)
                    remove_oldest(folder, path)
                os.utime(path)
                return self._read(path)
        except OSError as error:
            raise ConfigError(f"{self._field}: {folder} cannot be used: {error}; set NIWAKI_CACHE") from error

    def _key(self, device: torch.device) -> str:
        cast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"
        kinds = [kind.__module__ for kind in type(self).__mro__ if issubclass(kind, Remembered)]
        code = source_of([*kinds, divergence.__name__, states.__name__])
        told = [niwaki.__version__, code, self.teacher.fingerprint(), self.teacher.precision, cast, device.type]
        return hashlib.sha256(json.dumps([*told, self._what(), self._context.training_key()]).encode()).hexdigest()

    def _write(self, path: Path, device: torch.device) -> None:
        """All answers, into a folder that takes its name when it is whole. The caller holds the lock of `path`."""
        for stale in path.parent.glob(f".{path.name}.*"):
            shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            self._fill(partial, device)
            (partial / "kept.json").write_text(json.dumps(self._what()), encoding="utf-8")
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


class Ragged:
    """Where the values of each row stand in one list of all: row i has `counts[i]` of them from `starts[i]` on."""

    def __init__(self, folder: Path) -> None:
        self._starts, self._counts = (np.load(folder / f"{name}.npy") for name in ("starts", "counts"))

    @staticmethod
    def write(folder: Path, owners: np.ndarray, rows: int) -> None:
        """For a list whose values belong to these of so many rows; those of one row stand together."""
        starts, counts = spans(owners, rows)
        np.save(folder / "starts.npy", starts)
        np.save(folder / "counts.npy", counts)

    def of(self, rows: Tensor) -> list[np.ndarray]:
        """The places of each row's values."""
        numbers = rows.cpu().numpy()
        spans = zip(self._starts[numbers], self._counts[numbers], strict=True)
        return [np.arange(start, start + count) for start, count in spans]


def spans(owners: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, count) of each row's positions, by its number, in the list of their owners, where they stand together."""
    starts, counts = np.zeros(rows, np.int64), np.bincount(owners, minlength=rows)
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    starts[owners[first]] = first
    return starts, counts


def remove_oldest(folder: Path, keep: Path) -> None:
    """Until all answers together are below their bound, but for those that a process makes or opens just now, which
    holds their lock. Those that one has mapped stay readable to it."""
    found = sorted(entries(folder))
    total = sum(size for _, size, _ in found)
    for _, size, path in found:
        if total <= LARGEST:
            return
        if path == keep:
            continue
        with suppress(Timeout), FileLock(f"{path}.lock", blocking=False):
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(when it was last used, bytes, path) of all that is kept; another process may take some away meanwhile."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.is_dir() and path.name[0] != ".":
                yield path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path
