"""The fit: Lightning's Trainer around the Learner, from the start or from where a run stopped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from niwaki.callbacks import CallbackSettings, Clock, Interruption, Watch
from niwaki.data.corpus import Corpus
from niwaki.logger import LoggerSettings
from niwaki.measure.size import peak_memory_mb
from niwaki.module import DivergedError, Learner
from niwaki.recipe import Recipe
from niwaki.stage import Effects


@dataclass(frozen=True)
class Fitted:
    """What is known after the fit."""

    seconds: float
    steps: int
    trainable: int
    peak_memory: float
    folder: Path
    logger: Any
    logger_settings: LoggerSettings

    def facts(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "trainable": self.trainable,
            "train_seconds": self.seconds,
            "steps": self.steps,
            "peak_memory_mb": self.peak_memory,
        }

    def close(self, metrics: Mapping[str, Any]) -> None:
        """Log the final numbers, end the logging."""
        self.logger_settings.finish(self.logger, self.folder, metrics)


def fit(
    recipe: Recipe, corpus: Corpus, model: nn.Module, effects: Sequence[Effects], folder: Path,
    config: Mapping[str, Any], *, steps: int, resume: bool,
) -> Fitted:  # fmt: skip
    """Train `model` in place; leaves it with the best settled weights where the checkpoint callback keeps them.

    Raises:
        DivergedError: the loss is not finite; the last good checkpoint is kept and named.
        StoppedError: asked to stop by a signal; a checkpoint was saved.
    """
    checkpoints = folder / "checkpoints"
    learner = Learner(
        model, task=recipe.task, labels=corpus.labels, optimizer=recipe.optimizer, schedule=recipe.schedule,
        steps=steps, terms={name: term for e in effects for name, term in e.terms.items()},
        task_weight=recipe.task_weight,
    )  # fmt: skip
    logger = recipe.logger.build(folder, config)
    clock = Clock()
    callbacks = [*callbacks_of(recipe, effects, checkpoints, bool(logger)), clock]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer = recipe.trainer.build(folder, logger, callbacks)
    last = checkpoints / "last.ckpt"
    rank, world = trainer.global_rank, trainer.world_size
    batches = corpus.training(rank, world), corpus.evaluation("validation", rank, world)
    start = str(last) if resume and last.is_file() else None
    model.train()
    try:
        trainer.fit(learner, *batches, ckpt_path=start, weights_only=True if start else None)
    except DivergedError as error:
        kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
        raise DivergedError(f"{error}; {kept}; try a lower optimizer.lr") from error
    if (checkpoints / "best.ckpt").is_file() and any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks):
        best = torch.load(checkpoints / "best.ckpt", weights_only=True, map_location="cpu")
        learner.load_state_dict(best["state_dict"])
    return Fitted(
        clock.seconds, trainer.global_step, trainable, peak_memory_mb(), folder, logger, recipe.logger
    )


def callbacks_of(recipe: Recipe, effects: Sequence[Effects], checkpoints: Path, logged: bool) -> list[pl.Callback]:
    """The stages' callbacks first (masks are drawn before a checkpoint is saved), then the configured ones."""
    settled = max((e.settled for e in effects), default=0)
    watch = Watch(checkpoints, f"validation/{recipe.task.metric}", recipe.task.mode, settled, logged)
    hint = f"python train.py resume={shlex.quote(str(checkpoints.parent))}"
    found = [callback for e in effects for callback in e.callbacks]
    for settings in recipe.callbacks.values():
        found += settings.build(watch) if isinstance(settings, CallbackSettings) else [settings]
    return [*found, Interruption(checkpoints / "last.ckpt", hint)]
