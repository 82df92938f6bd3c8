"""What a teacher says of every training row: computed once, kept on disk, and read from there without the teacher."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional

import niwaki
from niwaki.compression.distill.divergence import with_rest
from niwaki.compression.distill.states import owned
from niwaki.data.encode import cache_folder
from niwaki.errors import ConfigError
from niwaki.model.teacher import Teacher
from niwaki.stage import Context

LARGEST = 20 * 1024**3  # bytes of all answers together; the oldest go first
SPARE = 1024**3  # bytes that a disk keeps free


@dataclass(frozen=True)
class Targets:
    """What a teacher said of some positions: logits (positions, classes), or, with `places` (positions, k), the
    log-probabilities (positions, k + 1) of the classes there and of all others together."""

    values: Tensor
    places: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is kept of a position: log-probabilities at `temperature` of the `top_k` likeliest of `classes` and of the
    rest together; with null, the logits of all, which serve any temperature."""

    classes: int
    top_k: int | None = None
    temperature: float | None = None

    @property
    def numbers(self) -> int:
        """Floats of a position."""
        return self.classes if self.top_k is None else self.top_k + 1

    def of(self, logits: Tensor) -> Targets:
        """From the teacher's logits (positions, classes or more)."""
        logits = logits[:, : self.classes].float()
        if self.top_k is None:
            return Targets(logits)
        assert self.temperature is not None
        logs = functional.log_softmax(logits / self.temperature, dim=-1)
        places = logs.topk(self.top_k, dim=-1).indices
        return Targets(with_rest(logs, places), places)


class Answers:
    """The file of one teacher's answers: positions in the order in which they were given, and where each row's are."""

    def __init__(self, folder: Path) -> None:
        self._kept = Kept(**json.loads((folder / "kept.json").read_text(encoding="utf-8")))
        self._starts, self._counts = (np.load(folder / f"{name}.npy") for name in ("starts", "counts"))
        self._values = self._mapped(folder / "values.f32", np.float32, self._kept.numbers)
        chosen = self._kept.top_k is not None
        self._places = self._mapped(folder / "places.i32", np.int32, self._kept.numbers - 1) if chosen else None

    @staticmethod
    def _mapped(path: Path, dtype: Any, width: int) -> np.ndarray:
        return np.memmap(path, dtype=dtype, mode="r").reshape(-1, width)

    def of(self, rows: Tensor) -> Targets:
        """What was said of these rows, one after another: the positions of each that count, in their order."""
        numbers = rows.cpu().numpy()
        spans = zip(self._starts[numbers], self._counts[numbers], strict=True)
        index = np.concatenate([np.arange(start, start + count) for start, count in spans])
        values = torch.from_numpy(self._values[index]).to(rows.device)
        places = None if self._places is None else torch.from_numpy(self._places[index].astype(np.int64))
        return Targets(values, None if places is None else places.to(rows.device))


class Remembered:
    """A teacher whose answers to the training rows are looked up: computed in one pass when they are first asked for,
    under the precision of that moment, unless a run has done so before. After that the teacher does not run.

    The name of the file is a digest of the teacher's weights, the encoded rows, the precision and what is kept, so that
    another of these has another file. Processes that want the same one wait for the first.
    """

    def __init__(self, teacher: Teacher, context: Context, kept: Kept, field: str) -> None:
        self._teacher: Teacher | None = teacher
        self._context = context
        self._kept = kept
        self._field = field
        self._answers: Answers | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        if self._answers is None:
            assert self._teacher is not None
            self._answers = self._open(batch["input_ids"].device)
            self._teacher.let_go()
            self._teacher = None
        return self._answers.of(batch["row"])

    def _open(self, device: torch.device) -> Answers:
        folder = cache_folder() / "answers"
        path = folder / self._key(device)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.is_dir():
                    self._write(path, device)
                    remove_oldest(folder, path)
            path.touch()
        except OSError as error:
            raise ConfigError(f"{self._field}=true: {folder} cannot be used: {error}; set NIWAKI_CACHE") from error
        return Answers(path)

    def _key(self, device: torch.device) -> str:
        assert self._teacher is not None
        cast = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "none"
        told = [niwaki.__version__, self._teacher.fingerprint(), self._teacher.precision, cast, device.type]
        return hashlib.sha256(
            json.dumps([*told, asdict(self._kept), self._context.training_key()]).encode()
        ).hexdigest()

    def _write(self, path: Path, device: torch.device) -> None:
        """All answers, into a folder that takes its name when it is whole."""
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            self._fill(partial, device)
            (partial / "kept.json").write_text(json.dumps(asdict(self._kept)), encoding="utf-8")
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _fill(self, folder: Path, device: torch.device) -> None:
        owners: list[Tensor] = []
        with (folder / "values.f32").open("wb") as values, (folder / "places.i32").open("wb") as places:
            batches = self._context.training()
            for number, batch in enumerate(batches):
                targets, owner = self._ask({name: tensor.to(device) for name, tensor in batch.items()})
                targets.values.cpu().numpy().tofile(values)
                if targets.places is not None:
                    targets.places.to(torch.int32).cpu().numpy().tofile(places)
                owners.append(owner.cpu())
                if number == 0:
                    self._check_space(folder, values.tell() + places.tell(), len(batches))
        starts, counts = spans(torch.cat(owners).numpy())
        np.save(folder / "starts.npy", starts)
        np.save(folder / "counts.npy", counts)

    def _ask(self, batch: Mapping[str, Tensor]) -> tuple[Targets, Tensor]:
        """What the teacher says of the positions that count, and the row of each."""
        assert self._teacher is not None
        logits, owner = owned(self._context.predictions, self._teacher.say(batch).outputs, batch, batch["row"])
        return self._kept.of(logits), owner

    def _check_space(self, folder: Path, first: int, batches: int) -> None:
        """Raise ConfigError where the disk has no room for as many batches as the first, which is the longest."""
        free, wanted = shutil.disk_usage(folder).free - SPARE, first * batches
        if wanted > free:
            raise ConfigError(
                f"{self._field}=true: the answers may need {wanted / 1e9:.1f} GB, {max(free, 0) / 1e9:.1f} GB are "
                "free; keep fewer classes (top_k), or leave it false"
            )


def spans(owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start, count) of each row's positions, by its number, in the list of their owners, where they stand together."""
    count = int(owners.max()) + 1
    starts, counts = np.zeros(count, np.int64), np.bincount(owners, minlength=count)
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    starts[owners[first]] = first
    return starts, counts


def remove_oldest(folder: Path, keep: Path) -> None:
    """Until all answers together are below their bound. Those that a process has mapped stay readable to it."""
    found = [(path.stat().st_mtime, path) for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for _, path in found}
    total = sum(sizes.values())
    for _, path in sorted(found):
        if total > LARGEST and path != keep:
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


Compare = Callable[[Tensor, Targets], Tensor]
"""(student's logits (positions, classes), what the teacher said) -> scalar."""


class RememberedTerm:
    """weight * what `compare` finds between the student's logits and remembered answers."""

    def __init__(self, answers: Remembered, context: Context, compare: Compare, weight: float) -> None:
        self._answers = answers
        self._predictions = context.predictions
        self._compare = compare
        self._weight = weight

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        said = self._answers(batch)
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return self._weight * self._compare(self._predictions(outputs, batch), said)
