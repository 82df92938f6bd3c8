"""Lightning callbacks of a run: checkpoints, early stopping, learning rate, progress, and orderly interruption."""

from __future__ import annotations

import abc
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, RichProgressBar

from niwaki.average import RunningAverage, equal, exponential
from niwaki.errors import ConfigError, UserError

if TYPE_CHECKING:
    from niwaki.data.corpus import Corpus
    from niwaki.task.task import Task


@dataclass(frozen=True)
class Watch:
    """What the callbacks need to know of the run."""

    folder: Path
    metric: str  # as logged, "validation/accuracy"
    mode: Literal["max", "min"]
    settled: int  # first optimizer step at which the model has its final form
    logged: bool  # whether there is a logger
    steps: int = 0  # optimizer steps of the whole fit
    epoch: int = 0  # and of one epoch


@dataclass(frozen=True, kw_only=True)
class CallbackSettings(abc.ABC):
    """Settings of one or more Lightning callbacks."""

    averages: ClassVar[bool] = False  # whether the weights that are kept are an average along the fit

    def settled(self, steps: int) -> int:
        """First optimizer step, of `steps`, at which what is kept has its final form."""
        return 0

    @abc.abstractmethod
    def build(self, watch: Watch) -> list[pl.Callback]: ...


def accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients wait for their optimizer step; a checkpoint would lose them."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_follows(trainer: pl.Trainer) -> bool:
    """At the end of a training batch: whether a validation comes next. A checkpoint of this moment would leave it out
    when it is gone on with."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def save(trainer: pl.Trainer, path: Path) -> None:
    """A checkpoint, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    trainer.save_checkpoint(partial)
    if trainer.is_global_zero:
        os.replace(partial, path)


class LastCheckpoint(pl.callbacks.Checkpoint):
    """`last.ckpt` after every validation, and every `every_steps` optimizer steps too if given."""

    def __init__(self, path: Path, every_steps: int | None) -> None:
        self._path = path
        self._every_steps = every_steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self._every_steps or trainer.global_step % self._every_steps or accumulating(trainer):
            return
        if not validation_follows(trainer):
            save(trainer, self._path)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not accumulating(trainer):
            save(trainer, self._path)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best step among those at which every schedule has ended: an earlier one is not the model asked for."""

    def __init__(self, settled: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._settled = settled

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= self._settled:
            super().on_validation_end(trainer, pl_module)


class PatientStopping(EarlyStopping):
    """Early stopping that does not count before every schedule has ended."""

    def __init__(self, settled: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._settled = settled

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:  # gone on with after it had stopped the fit
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= self._settled:
            super().on_validation_end(trainer, pl_module)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(CallbackSettings):
    """`checkpoints/last.ckpt`, after every validation and every `every_steps` optimizer steps, to go on from; and, with
    `best`, `checkpoints/best.ckpt`, the best on validation, which is what the run then goes on with.

    Nothing is saved at the end of an epoch itself: Lightning 2.6 would resume from there one batch too late.
    """

    best: bool = True
    every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ConfigError(f"callbacks.checkpoint.every_steps={self.every_steps}: needs null or at least 1")

    def build(self, watch: Watch) -> list[pl.Callback]:
        last = LastCheckpoint(watch.folder / "last.ckpt", self.every_steps)
        best = BestCheckpoint(
            watch.settled, dirpath=watch.folder, filename="best", monitor=watch.metric, mode=watch.mode, save_top_k=1,
            enable_version_counter=False, save_weights_only=True, save_on_train_epoch_end=False,
        )  # fmt: skip
        return [best, last] if self.best else [last]


@dataclass(frozen=True, kw_only=True)
class StopEarly(CallbackSettings):
    """Stop when the watched validation score has not risen by `min_delta` for `patience` validations."""

    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"callbacks.early_stopping.patience={self.patience}: needs at least 1")

    def build(self, watch: Watch) -> list[pl.Callback]:
        return [
            PatientStopping(
                watch.settled, monitor=watch.metric, mode=watch.mode, patience=self.patience,
                min_delta=self.min_delta, check_on_train_epoch_end=False,
            )
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LearningRate(CallbackSettings):
    """Logs the learning rate at every logged step."""

    def build(self, watch: Watch) -> list[pl.Callback]:
        return [LearningRateMonitor(logging_interval="step")] if watch.logged else []


@dataclass(frozen=True, kw_only=True)
class Progress(CallbackSettings):
    """A progress bar, redrawn every `every_steps` batches."""

    every_steps: int = 5

    def build(self, watch: Watch) -> list[pl.Callback]:
        return [RichProgressBar(refresh_rate=self.every_steps)]


@dataclass(frozen=True, kw_only=True)
class Averaging(CallbackSettings, abc.ABC):
    """`begin`: the share of the fit after which the average begins; `every`: optimizer steps between the weights that
    enter it."""

    averages: ClassVar[bool] = True

    begin: float
    every: int | None

    def __post_init__(self) -> None:
        option = type(self).__name__.lower()
        if not 0 <= self.begin < 1:
            raise ConfigError(f"callbacks.{option}.begin={self.begin}: needs a number in 0..1, below 1")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"callbacks.{option}.every={self.every}: needs a whole number of at least 1")

    def settled(self, steps: int) -> int:
        return round(self.begin * steps)

    def span(self, watch: Watch) -> tuple[int, int]:
        """The first step whose weights enter the average, and how many steps lie between two of them.

        Raises:
            ConfigError: fewer than two weights would be in it.
        """
        first, every = self.settled(watch.steps), self.every or watch.epoch
        count = len(range(first, watch.steps + 1, every)) if every else 0
        if watch.steps and count < 2:
            option = type(self).__name__.lower()
            raise ConfigError(
                f"callbacks.{option}.every={self.every}: makes an average of {count} of the fit's {watch.steps} steps; "
                f"needs two at least: fewer steps between them, or a lower callbacks.{option}.begin"
            )
        return first, every


@dataclass(frozen=True, kw_only=True)
class EMA(Averaging):
    """The exponential moving average of the weights is validated and kept (Polyak & Juditsky 1992; Tarvainen & Valpola
    2017, arXiv:1703.01780).

    a <- d a + (1 - d) w every `every` optimizer steps, with d = `decay`, or, with `warm_up`, at most
    (1 + n) / (10 + n) after n of them, so that the start does not weigh on a short fit.
    """

    decay: float = 0.999
    warm_up: bool = True
    begin: float = 0.0
    every: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay < 1:
            raise ConfigError(f"callbacks.ema.decay={self.decay}: needs a number above 0 and below 1")

    def build(self, watch: Watch) -> list[pl.Callback]:
        share = exponential(self.decay, warm_up=self.warm_up)
        return [RunningAverage(share, *self.span(watch))]


@dataclass(frozen=True, kw_only=True)
class SWA(Averaging):
    """The equal average of the weights of the last part of the fit is validated and kept (Izmailov et al. 2018,
    arXiv:1803.05407); goes with `schedule=swa`, which keeps the rate up.

    a <- (n a + w) / (n + 1) every `every` optimizer steps (null: every epoch) from `begin` on.
    """

    begin: float = 0.75
    every: int | None = None

    def build(self, watch: Watch) -> list[pl.Callback]:
        return [RunningAverage(equal, *self.span(watch))]


class StoppedError(UserError):
    """The user, or the machine, asked the run to stop; it saved first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Interruption(pl.callbacks.Checkpoint):
    """On SIGTERM or Ctrl-C: finish the batch, save `last.ckpt`, stop. A second Ctrl-C stops at once.

    Saving inside a signal handler can meet half-updated weights; the handler only sets a flag. A validation that was
    broken off is done over, from its start, when the run goes on; that of the last step is let to end, since Lightning
    would not come back to it. It is a Checkpoint so that its turn comes after those that keep the best.
    """

    def __init__(self, checkpoint: Path, hint: str) -> None:
        self._checkpoint = checkpoint
        self._hint = hint
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._broken_off = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._received is not None and not accumulating(trainer) and not validation_follows(trainer):
            self._save_and_stop(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._received is not None and not accumulating(trainer) and not trainer.should_stop:
            self._broken_off = True
            self._save_and_stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._received is not None and not accumulating(trainer):
            self._save_and_stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.restore()  # before Lightning gives back the handlers that it put in itself: they would come after
        if self._received is not None:  # since the last validation; what is saved is of the last step already
            self._stop(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.restore()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._broken_off:
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}  # Lightning's mark of such a validation
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress.update(total=dict(begun), current=dict(begun), is_last_batch=False)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _save_and_stop(self, trainer: pl.Trainer) -> NoReturn:
        save(trainer, self._checkpoint)
        self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> NoReturn:
        assert self._received is not None
        name = signal.Signals(self._received).name
        raise StoppedError(f"{name} at optimizer step {trainer.global_step}; go on with: {self._hint}", self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


class Refit(pl.Callback):
    """Before each validation: what of the head is computed, rather than learned, follows the model. Its turn comes
    after those that put an average of the weights into the model."""

    def __init__(self, task: Task, corpus: Corpus) -> None:
        self._task, self._corpus = task, corpus

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._task.refit(pl_module.model, self._corpus)


class LastValidation(pl.Callback):
    """Has step `steps`, the last one, validated and so saved, wherever in an epoch or between validations it falls."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)  # gone on with from the last step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if trainer.global_step >= self._steps:
            trainer.should_stop = True


class Clock(pl.Callback):
    """Seconds of fitting, those before an interruption included."""

    def __init__(self) -> None:
        self._earlier = 0.0
        self._start = 0.0
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = self._so_far()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._so_far()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = self.seconds = state_dict["seconds"]

    def _so_far(self) -> float:
        return self._earlier + (time.perf_counter() - self._start if self._start else 0.0)
