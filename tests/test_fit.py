"""The fit as a whole: the last step, interruptions at any moment, divergence, and what others print."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from niwaki import compose
from niwaki.callbacks import StoppedError
from niwaki.data.corpus import Corpus
from niwaki.fit import Fitted, fit
from niwaki.module import DivergedError
from niwaki.pipeline import assemble

WORDS = ("pine", "oak", "maple", "koi", "carp", "pond")
SETTINGS = (
    "model=tiny-bert", "trainer=cpu", "logger=none", "trainer.precision=fp32", "data=files", "data.batch_size=4",
    "data.eval_batch_size=2", "optimizer.lr=0.01", "callbacks=[checkpoint]",
)  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    made = [{"text": f"{WORDS[i % 6]} {i} " * (1 + i % 5), "label": "tree" if i % 6 < 3 else "fish"} for i in range(35)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


class Steps(pl.Callback):
    """At which steps the fit validated to the end."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated.append(trainer.global_step)


class Signal(pl.Callback):
    """A signal in `hook` at optimizer step `step`, and what the fit still does after it."""

    def __init__(self, hook: str, step: int) -> None:
        self._step = step
        self.after: list[str] = []
        self.sent = False
        for name in ("on_train_batch_start", "on_validation_batch_start", "on_validation_end", "on_train_epoch_end"):
            setattr(self, name, lambda trainer, *_, name=name: self._pass(trainer, name, hook))

    def _pass(self, trainer: pl.Trainer, name: str, hook: str) -> None:
        if self.sent:
            self.after.append(name)
        elif name == hook and trainer.global_step == self._step:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    rows: Path, folder: Path, overrides: Sequence[str] = (), callbacks: Sequence[pl.Callback] = (), resume: bool = False
) -> Fitted:
    config = compose.compose([*SETTINGS, f"data.train='{rows}'", *overrides]).config
    recipe = compose.build(config)
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    work = assemble(recipe, corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed))
    work.callbacks += callbacks
    return fit(recipe, corpus, work, folder, config, resume=resume)


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("overrides", "validated"),
    [
        (("trainer.max_epochs=2",), [7, 14]),
        (("trainer.max_epochs=2", "trainer.validate_every=4"), [4, 8, 12, 14]),
        (("trainer.max_epochs=2", "trainer.validate_every=4", "callbacks.checkpoint.every_steps=3"), [4, 8, 12, 14]),
        (("trainer.max_epochs=2", "trainer.max_steps=9"), [7, 9]),
        (("trainer.max_epochs=2", "trainer.max_steps=9", "callbacks.checkpoint.every_steps=2"), [7, 9]),
        (("trainer.max_epochs=2", "trainer.accumulate=2"), [4, 8]),
    ],
)
def test_the_last_step_is_validated_and_saved(
    rows: Path, tmp_path: Path, overrides: tuple[str, ...], validated: list[int]
) -> None:
    steps = Steps()
    fitted = run(rows, tmp_path / "run", overrides, [steps])
    assert steps.validated == validated
    assert fitted.steps == validated[-1]
    assert checkpoint(tmp_path / "run", "last")["global_step"] == validated[-1]


EVERY = ("trainer.max_epochs=2", "trainer.validate_every=4", "callbacks.checkpoint.every_steps=3")
EPOCHS = ("trainer.max_epochs=2",)
LIMITED = ("trainer.max_epochs=2", "trainer.max_steps=9")
ACCUMULATED = ("trainer.max_epochs=2", "trainer.accumulate=2")


@pytest.mark.parametrize(
    ("overrides", "hook", "step"),
    [
        (EVERY, "on_train_batch_start", 1),
        (EVERY, "on_train_batch_start", 3),  # a validation follows the step
        (EVERY, "on_validation_batch_start", 4),
        (EVERY, "on_validation_end", 8),
        (EVERY, "on_validation_batch_start", 14),  # the last step
        (EPOCHS, "on_train_batch_start", 6),
        (EPOCHS, "on_validation_batch_start", 7),
        (EPOCHS, "on_validation_end", 7),
        (EPOCHS, "on_train_epoch_end", 7),
        (EPOCHS, "on_validation_batch_start", 14),
        (EPOCHS, "on_train_epoch_end", 14),
        (LIMITED, "on_validation_batch_start", 7),
        (LIMITED, "on_validation_batch_start", 9),
        (LIMITED, "on_validation_end", 9),
        (ACCUMULATED, "on_train_batch_start", 2),
        (ACCUMULATED, "on_validation_batch_start", 4),
    ],
)
def test_a_signal_at_any_moment_stops_soon_and_the_run_goes_on_to_the_same_end(
    rows: Path, tmp_path: Path, overrides: tuple[str, ...], hook: str, step: int
) -> None:
    whole, parts = Steps(), Steps()
    run(rows, tmp_path / "whole", overrides, [whole])
    sent = Signal(hook, step)
    with pytest.raises(StoppedError, match="SIGTERM at optimizer step"):
        run(rows, tmp_path / "parts", overrides, [parts, sent])
    assert sent.sent
    if whole.validated[-1] != step:
        assert sent.after.count("on_validation_batch_start") <= 1
        assert sent.after.count("on_train_batch_start") <= 2
    run(rows, tmp_path / "parts", overrides, [parts], resume=True)
    assert sorted(set(parts.validated)) == whole.validated
    for name in ("last", "best"):
        left, right = (checkpoint(tmp_path / place, name) for place in ("whole", "parts"))
        assert left["global_step"] == right["global_step"]
        assert all(torch.equal(tensor, right["state_dict"][key]) for key, tensor in left["state_dict"].items())
    left, right = (checkpoint(tmp_path / place, "last") for place in ("whole", "parts"))
    assert left["lr_schedulers"] == right["lr_schedulers"]
    best = [next(v for k, v in one["callbacks"].items() if "BestCheckpoint" in k) for one in (left, right)]
    assert best[0]["best_model_score"] == best[1]["best_model_score"]


def test_a_run_that_early_stopping_ended_does_not_go_on(rows: Path, tmp_path: Path) -> None:
    patient = (
        "trainer.max_epochs=9", "callbacks=[checkpoint,early_stopping]", "callbacks.early_stopping.patience=1",
        "callbacks.early_stopping.min_delta=2.0",
    )  # fmt: skip
    first = run(rows, tmp_path / "run", patient)
    assert first.steps == 14
    assert run(rows, tmp_path / "run", patient, resume=True).steps == 14


class Poison(pl.Callback):
    """Makes a weight not finite after the last checkpoint is saved."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        next(p for p in pl_module.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")


@pytest.mark.parametrize("callbacks", ["[checkpoint]", "[]"])
def test_weights_that_are_not_finite_at_the_end_are_refused(rows: Path, tmp_path: Path, callbacks: str) -> None:
    kept = "the last good checkpoint is" if "checkpoint" in callbacks else "there is no checkpoint yet"
    with pytest.raises(DivergedError, match=f"^the weights are not finite after optimizer step 2; {kept}"):
        run(rows, tmp_path / "run", ("trainer.max_steps=2", f"callbacks={callbacks}"), [Poison()])


def test_lightnings_notices_are_not_shown(rows: Path, tmp_path: Path) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)  # as its import leaves it
    run(rows, tmp_path / "run", ("trainer.max_steps=1",))
    notices = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    assert not notices.isEnabledFor(logging.WARNING)
    assert notices.isEnabledFor(logging.ERROR)
