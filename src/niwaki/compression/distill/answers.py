"""The logits of a teacher on every training row, kept on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from niwaki.compression.distill import remembered
from niwaki.compression.distill.divergence import with_rest
from niwaki.compression.distill.remembered import Ragged, Remembered
from niwaki.errors import ConfigError
from niwaki.model.teacher import Teacher
from niwaki.stage import Context


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
        self._places_of = Ragged(folder)
        self._values = self._mapped(folder / "values.f32", np.float32, self._kept.numbers)
        chosen = self._kept.top_k is not None
        self._places = self._mapped(folder / "places.i32", np.int32, self._kept.numbers - 1) if chosen else None

    @staticmethod
    def _mapped(path: Path, dtype: Any, width: int) -> np.ndarray:
        return np.memmap(path, dtype=dtype, mode="r").reshape(-1, width)

    def of(self, rows: Tensor) -> Targets:
        """What was said of these rows, one after another: the positions of each that count, in their order."""
        index = np.concatenate(self._places_of.of(rows))
        values = torch.from_numpy(self._values[index]).to(rows.device)
        places = None if self._places is None else torch.from_numpy(self._places[index].astype(np.int64))
        return Targets(values, None if places is None else places.to(rows.device))


class RememberedLogits(Remembered[Answers]):
    """A teacher whose logits on the training rows are looked up."""

    def __init__(self, teacher: Teacher, context: Context, kept: Kept, field: str) -> None:
        super().__init__(teacher, context, f"{field}=true")
        self._kept = kept
        self._by_token = False  # whether there are logits for each token, rather than for each row

    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        return self.found(batch).of(batch["row"])

    def _what(self) -> Any:
        return asdict(self._kept)

    def _read(self, folder: Path) -> Answers:
        return Answers(folder)

    def _fill(self, folder: Path, device: torch.device) -> None:
        owners: list[Tensor] = []
        rows = 0
        with (folder / "values.f32").open("wb") as values, (folder / "places.i32").open("wb") as places:
            for number, batch in enumerate(self._context.training()):
                targets, owner = self._ask({name: tensor.to(device) for name, tensor in batch.items()})
                targets.values.cpu().numpy().tofile(values)
                if targets.places is not None:
                    targets.places.to(torch.int32).cpu().numpy().tofile(places)
                owners.append(owner.cpu())
                rows += len(batch["row"])
                if number == 0:
                    self._check_space(folder, (values.tell() + places.tell()) // max(len(owner), 1))
        Ragged.write(folder, torch.cat(owners).numpy(), rows)

    def _ask(self, batch: Mapping[str, Tensor]) -> tuple[Targets, Tensor]:
        """What the teacher says of the positions that count, and the row of each."""
        outputs = self.teacher.say(batch).outputs
        self._shape = outputs.logits.shape
        owners = self._context.owners(outputs, batch)
        return self._kept.of(self._context.predictions(outputs, batch)), batch["row"][owners]

    def _count(self, batch: Mapping[str, Tensor]) -> int:
        """How many positions of a batch count; no model has to read it."""
        read = batch.get("decoder_input_ids", batch["input_ids"])
        shape = read.shape if len(self._shape) > 2 else read.shape[:1]
        outputs = SimpleNamespace(logits=torch.zeros(()).expand(*shape, self._shape[-1]))
        return len(self._context.owners(outputs, batch))

    def _check_space(self, folder: Path, bytes_each: int) -> None:
        """Raise ConfigError where the disk has no room for so many bytes of each position of all rows."""
        free = shutil.disk_usage(folder).free - remembered.SPARE
        wanted = bytes_each * sum(map(self._count, self._context.training()))
        if wanted > free:
            raise ConfigError(
                f"{self._field}: the answers need {wanted / 1e9:.1f} GB, {max(free, 0) / 1e9:.1f} GB are "
                "free; keep fewer classes (top_k), or leave it false"
            )


Compare = Callable[[Tensor, Targets], Tensor]
"""(student's logits (positions, classes), what the teacher said) -> scalar."""


class RememberedTerm:
    """weight * what `compare` finds between the student's logits and remembered answers."""

    def __init__(self, answers: RememberedLogits, context: Context, compare: Compare, weight: float) -> None:
        self._answers = answers
        self._predictions = context.predictions
        self._compare = compare
        self._weight = weight

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        said = self._answers(batch)
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return self._weight * self._compare(self._predictions(outputs, batch), said)
