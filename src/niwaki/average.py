"""Averages of the weights along a fit: what is validated, kept as the best and left in the end, while the fit itself
goes on from the latest weights.

Lightning's own WeightAveraging is not used: it copies the whole model, frozen weights and all, would show masks as
they were at its last update, and neither a checkpoint of weights alone nor one of a moment within a validation would
hold the right weights.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class Average(pl.Callback, abc.ABC):
    """Takes the place of the latest weights in a validation and after the fit, and in checkpoints of weights alone.

    Only what learns is averaged. Buffers (masks, scales) stay the latest, and a chain of links runs over the averaged
    base weight as over any other, so that its sparsity and its grid hold.
    """

    def __init__(self) -> None:
        self._latest: dict[str, Tensor] = {}  # the weights to go on from, while the average is in the model

    @abc.abstractmethod
    def average(self, learner: Any) -> Mapping[str, Tensor]:
        """The averaged weights by their name in the model; empty as long as there are none."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.average = self

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._latest = exchange(pl_module.model, self.average(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        exchange(pl_module.model, self._latest)
        self._latest = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        exchange(pl_module.model, self.average(pl_module))

    def write(self, checkpoint: dict[str, Any], learner: Any) -> None:
        """Have a checkpoint to go on from hold the latest weights, one of weights alone the average."""
        inside = bool(self._latest)  # the average is in the model already
        weights = self._latest if "optimizer_states" in checkpoint else {} if inside else self.average(learner)
        names = {id(p): name for name, p in learner.model.named_parameters()}
        for name, parameter in learner.model.named_parameters(remove_duplicate=False):  # a tied weight has two names
            if names[id(parameter)] in weights:
                checkpoint["state_dict"][f"model.{name}"] = weights[names[id(parameter)]]


def exchange(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `weights` into the model; returns a copy of what they replaced."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        replaced = {name: named[name].detach().clone() for name in weights}
        for name, weight in weights.items():
            named[name].copy_(weight)
    return replaced


def learning(learner: Any, among: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """What of a module (null: the model) is in the optimizer, by its name there."""
    inside = {id(p) for group in learner.trainer.optimizers[0].param_groups for p in group["params"]}
    return {name: p for name, p in (among or learner.model).named_parameters() if id(p) in inside}


class RunningAverage(Average):
    """a <- a + share(n) (w - a) with the weights w every `every` optimizer steps, n counting those in it already; it
    begins as the weights of step `begin`."""

    def __init__(self, share: Callable[[int], float], begin: int, every: int) -> None:
        super().__init__()
        self._share = share
        self._begin = begin
        self._every = every
        self._count = 0
        self._step = -1
        self._weights: dict[str, Tensor] = {}

    def average(self, learner: Any) -> Mapping[str, Tensor]:
        return self._weights

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._update(trainer.global_step, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self._update(trainer.global_step, pl_module)

    def _update(self, step: int, learner: Any) -> None:
        if step <= self._step or step < self._begin or (step - self._begin) % self._every:
            return
        self._step = step
        latest = {name: parameter.detach() for name, parameter in learning(learner).items()}
        if not self._count:
            self._weights = {name: weight.clone() for name, weight in latest.items()}
        else:
            self._weights = {name: weight.to(latest[name].device) for name, weight in self._weights.items()}
            share = self._share(self._count)
            torch._foreach_lerp_(list(self._weights.values()), [latest[name] for name in self._weights], share)
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "step": self._step, "weights": dict(self._weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count, self._step = state_dict["count"], state_dict["step"]
        self._weights = dict(state_dict["weights"])


def exponential(decay: float, *, warm_up: bool) -> Callable[[int], float]:
    """The share of the n-th new weights: 1 - decay, and with `warm_up` at least 1 - (1 + n) / (10 + n), as in
    TensorFlow's ExponentialMovingAverage."""
    return lambda count: 1 - (min(decay, (1 + count) / (10 + count)) if warm_up else decay)


def equal(count: int) -> float:
    """The share that makes all weights count alike: 1 / (n + 1)."""
    return 1 / (count + 1)


class ScheduleFreeAverage(Average):
    """x of a schedule-free optimizer, out of y, which the model holds, and z, which the optimizer holds:
    x = y + (1 - 1 / b1) (z - y)."""

    def average(self, learner: Any) -> Mapping[str, Tensor]:
        optimizer = learner.trainer.optimizers[0]
        share = 1 - 1 / optimizer.defaults["betas"][0]
        stepped = {name: y for name, y in learning(learner).items() if "z" in optimizer.state.get(y, {})}
        return {name: torch.lerp(y.detach(), optimizer.state[y]["z"], share) for name, y in stepped.items()}
