"""Checkpoints and stopping that wait for the final form of a model, orderly interruption, and the clock."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from niwaki.callbacks import (
    BestCheckpoint,
    Checkpoint,
    Clock,
    Interruption,
    LearningRate,
    Progress,
    StopEarly,
    StoppedError,
    Watch,
)
from niwaki.errors import ConfigError

SCORES = [0.9, 0.8, 0.5, 0.7, 0.6, 0.55]  # by epoch of two optimizer steps each


class Scripted(pl.LightningModule):
    """Validation scores by epoch as written; the one weight counts the steps."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.scores = scores

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation/score", self.scores[self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(module: pl.LightningModule, callbacks: list[pl.Callback], folder: Path, **settings: Any) -> pl.Trainer:
    plain: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "max_epochs": len(SCORES), "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "callbacks": callbacks,
    }  # fmt: skip
    trainer = pl.Trainer(**(plain | settings))
    trainer.fit(module, DataLoader([0, 1]), DataLoader([0]), ckpt_path=None)  # type: ignore[arg-type]
    return trainer


def watch(folder: Path, settled: int = 0, mode: Any = "max") -> Watch:
    return Watch(folder, "validation/score", mode, settled, logged=False)


def weight_of(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["state_dict"]["weight"])


@pytest.mark.parametrize(
    ("settled", "mode", "steps"),
    [(0, "max", 2), (2, "max", 2), (3, "max", 4), (5, "max", 8), (0, "min", 6), (9, "min", 12)],
)
def test_the_best_checkpoint_is_the_best_settled_one(tmp_path: Path, settled: int, mode: str, steps: int) -> None:
    fit(Scripted(SCORES), Checkpoint().build(watch(tmp_path, settled, mode)), tmp_path)
    assert weight_of(tmp_path / "best.ckpt") == steps
    assert weight_of(tmp_path / "last.ckpt") == 12
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_no_best_checkpoint_where_the_model_never_settles(tmp_path: Path) -> None:
    fit(Scripted(SCORES), Checkpoint().build(watch(tmp_path, 13)), tmp_path)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


def test_without_best_only_the_last_is_kept(tmp_path: Path) -> None:
    (last,) = Checkpoint(best=False, every_steps=5).build(watch(tmp_path))
    assert not isinstance(last, BestCheckpoint)
    fit(Scripted(SCORES), [last], tmp_path)
    assert weight_of(tmp_path / "last.ckpt") == 12


@pytest.mark.parametrize(("settled", "epochs"), [(0, 3), (3, 4), (5, 6)])
def test_early_stopping_does_not_count_before_the_model_has_settled(tmp_path: Path, settled: int, epochs: int) -> None:
    # Two scores in a row without a rise, from the first settled one on:
    # settled 0: .9 | .8 .5; 3: .8 | .5 .7; 5: .5 | .7 rises | .6 .55
    (stop,) = StopEarly(patience=2).build(watch(tmp_path, settled))
    module = Scripted(SCORES)
    trainer = fit(module, [stop], tmp_path)
    assert trainer.current_epoch == epochs
    assert module.weight.item() == 2 * epochs


def test_a_rise_must_be_large_enough(tmp_path: Path) -> None:
    (stop,) = StopEarly(patience=2, min_delta=0.1).build(watch(tmp_path))
    assert fit(Scripted([0.5, 0.55, 0.59, 0.8, 0.9, 0.9]), [stop], tmp_path).current_epoch == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_batch_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    class Signalled(Scripted):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if self.global_step == 3:
                os.kill(os.getpid(), number)
            return super().training_step(batch, index)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    interruption = Interruption(tmp_path / "last.ckpt", "python train.py resume=here")
    with pytest.raises(
        StoppedError, match=rf"^{number.name} at optimizer step 4; go on with: python train.py"
    ) as caught:
        fit(Signalled(SCORES), [interruption], tmp_path)
    assert caught.value.exit_code == 128 + number
    assert weight_of(tmp_path / "last.ckpt") == 4
    assert {n: signal.getsignal(n) for n in handlers} == handlers


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    interruption = Interruption(tmp_path / "last.ckpt", "")
    interruption._receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interruption._receive(signal.SIGINT, None)
    interruption._receive(signal.SIGTERM, None)


def test_a_fit_in_peace_gives_the_signals_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    fit(Scripted(SCORES), [Interruption(tmp_path / "last.ckpt", "")], tmp_path, max_epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "last.ckpt").exists()


def test_the_clock_adds_what_was_before_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    first, second = Clock(), Clock()
    first.on_train_start(None, None)  # type: ignore[arg-type]
    now[0] += 5
    second.load_state_dict(first.state_dict())
    now[0] += 1000
    second.on_train_start(None, None)  # type: ignore[arg-type]
    now[0] += 3
    second.on_train_end(None, None)  # type: ignore[arg-type]
    assert second.seconds == 8


def test_the_rate_is_watched_only_where_it_is_logged(tmp_path: Path) -> None:
    assert LearningRate().build(watch(tmp_path)) == []
    assert len(LearningRate().build(Watch(tmp_path, "x", "max", 0, logged=True))) == 1
    (bar,) = Progress(every_steps=7).build(watch(tmp_path))
    assert isinstance(bar, pl.callbacks.ProgressBar)


@pytest.mark.parametrize("build", [lambda: Checkpoint(every_steps=0), lambda: StopEarly(patience=0)])
def test_refusals(build: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"^callbacks\.\w+\.(every_steps|patience)=0"):
        build()
