"""The fit: Lightning's Trainer around the Learner, from the start or from where a run stopped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from niwaki.callbacks import BestCheckpoint, CallbackSettings, Clock, Interruption, LastValidation, Refit, Watch
from niwaki.data.corpus import Corpus
from niwaki.edits import Edit
from niwaki.logger import LoggerSettings
from niwaki.measure.size import peak_memory_mb
from niwaki.module import DivergedError, Learner
from niwaki.quiet import quiet_loggers
from niwaki.recipe import Recipe
from niwaki.stage import Context, Effects, Retell, Term


@dataclass
class Work:
    """A model in the making: what the stages have done to it, and what they add to the fit."""

    model: Any
    base_config: dict[str, Any]  # before any edit
    context: Context
    edits: list[Edit] = field(default_factory=list)
    callbacks: list[pl.Callback] = field(default_factory=list)
    terms: dict[str, Term] = field(default_factory=dict)
    settled: int = 0  # first optimizer step at which the model has its final form
    lr_factors: dict[str, float] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)  # that learn beside the model
    retells: list[Retell] = field(default_factory=list)  # what is done to each training batch before it is read

    def add(self, effects: Effects) -> None:
        """Take in what a prepared stage adds."""
        self.edits += effects.edits
        self.callbacks += effects.callbacks
        self.terms |= effects.terms
        self.settled = max(self.settled, effects.settled)
        self.lr_factors |= effects.lr_factors
        self.modules |= effects.modules
        self.retells += effects.retells


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


def fit(recipe: Recipe, corpus: Corpus, work: Work, folder: Path, config: Mapping[str, Any], *, resume: bool) -> Fitted:
    """Train the model in place; leaves it with the best settled weights where the checkpoint callback keeps them.

    Raises:
        DivergedError: the loss or a weight is not finite; the last good checkpoint is kept and named.
        StoppedError: asked to stop by a signal; a checkpoint was saved.
    """
    quiet_loggers()
    checkpoints, model = folder / "checkpoints", work.model
    learner = Learner(
        model, task=recipe.task, labels=corpus.labels, tokenizer=corpus.tokenizer, optimizer=recipe.optimizer,
        schedule=recipe.schedule, steps=work.context.steps, terms=work.terms, task_weight=recipe.task_weight,
        lr_factors=work.lr_factors, modules=work.modules, retells=work.retells,
    )  # fmt: skip
    logger = recipe.logger.build(folder, config)
    clock = Clock()
    callbacks = [*callbacks_of(recipe, work, checkpoints, bool(logger)), clock]
    callbacks += [Refit(recipe.task, corpus)] if recipe.task.refits else []
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer = recipe.trainer.build(folder, logger, callbacks)
    last = checkpoints / "last.ckpt"
    rank, world = trainer.global_rank, trainer.world_size
    batches = corpus.training(rank, world), corpus.evaluation("validation", rank, world)
    start = str(last) if resume and last.is_file() else None
    model.train()
    if recipe.trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        if work.context.steps:
            trainer.fit(learner, *batches, ckpt_path=start, weights_only=True if start else None)
            learner.check_weights()
    except DivergedError as error:
        kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
        raise DivergedError(f"{error}; {kept}; try a lower optimizer.lr") from error
    if (checkpoints / "best.ckpt").is_file() and any(isinstance(c, BestCheckpoint) for c in callbacks):
        best = torch.load(checkpoints / "best.ckpt", weights_only=True, map_location="cpu")
        learner.load_state_dict(best["state_dict"])
    return Fitted(clock.seconds, trainer.global_step, trainable, peak_memory_mb(), folder, logger, recipe.logger)


def callbacks_of(recipe: Recipe, work: Work, checkpoints: Path, logged: bool) -> list[pl.Callback]:
    """The stages' callbacks first (masks are drawn before a checkpoint is saved), then the configured ones."""
    steps, epoch = work.context.steps, work.context.epoch
    settled = max([work.settled, *(s.settled(steps) for s in recipe.callback_settings)])
    watch = Watch(
        checkpoints, f"validation/{recipe.task.metric}", recipe.task.mode, settled, logged, steps=steps, epoch=epoch
    )
    hint = f"python train.py resume={shlex.quote(str(checkpoints.parent))}"
    average = recipe.optimizer.average()
    found = [*work.callbacks, *([average] if average else [])]
    for settings in recipe.callbacks.values():
        found += settings.build(watch) if isinstance(settings, CallbackSettings) else [settings]
    return [*found, LastValidation(steps), Interruption(checkpoints / "last.ckpt", hint)]
