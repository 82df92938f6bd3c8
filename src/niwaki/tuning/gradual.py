"""Gradual unfreezing: the head learns first, then block after block from the top (ULMFiT, Howard & Ruder 2018,
arXiv:1801.06146)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.depth import depths
from niwaki.stage import Context, Effects, Tuning
from niwaki.tuning.freeze import train_only


class Thaw(pl.Callback):
    """Freezes what is not due yet; the step alone decides, so that a fit that is gone on with finds its place.

    The optimizer holds everything from the start. A frozen parameter has no gradient, so that no optimizer makes a
    state for it, moves it or lets it decay; its moments and their corrections begin when it thaws.
    """

    def __init__(self, due: Mapping[nn.Parameter, int]) -> None:
        self.due = dict(due)  # parameter -> first optimizer step that moves it

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.thaw(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.thaw(trainer.global_step)

    def thaw(self, step: int) -> None:
        """Let what is due at the optimizer step with this number (from 0) learn, and nothing else."""
        for parameter, due in self.due.items():
            parameter.requires_grad_(due <= step)


@dataclass(frozen=True, kw_only=True)
class Gradual(Tuning):
    """At first only what stands above the blocks learns; after every epoch the next block from the top joins it, and
    after the lowest block the embeddings. Where nothing that is not tied to the embeddings stands above the blocks
    (BART's decoder), the top block learns first.

    In a fit with fewer epochs than there are parts to thaw, they come at equal distances, so that all learn in the end.
    `every`, a share of the fit, sets the distance; what would thaw after the end of the fit then stays frozen.
    """

    paper: ClassVar[str] = "Howard & Ruder 2018, arXiv:1801.06146"

    every: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None and not 0 < self.every < 1:
            raise ConfigError(
                f"tuning.every={self.every}: needs null (an epoch, at most) or a number above 0 and below 1"
            )

    def needs_fit(self) -> str:
        return "tuning=gradual: needs a fit; without one (trainer.max_epochs=0) use tuning=full"

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        depth = depths(context.anatomy)
        first = min(depth.values())  # of the top block where nothing stands above: a tied output layer is an embedding
        usual = min(context.epoch, context.steps / (max(depth.values()) - first + 1))
        interval = usual if self.every is None else self.every * context.steps
        due = {p: round((depth[name] - first) * interval) for name, p in model.named_parameters()}
        train_only(model, [p for p, step in due.items() if step < context.steps])
        return Effects(callbacks=[Thaw({p: step for p, step in due.items() if step < context.steps})])
