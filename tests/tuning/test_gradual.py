"""Gradual unfreezing: what moves at which step, and that nothing frozen moves, decays or gathers moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.errors import ConfigError
from niwaki.optimizer import SGD, Adafactor, Adam, AdamW, Lion, ScheduleFree
from niwaki.tuning.gradual import Gradual

GROUPS = (("classifier.", "bert.pooler."), (".layer.2.",), (".layer.1.",), (".layer.0.",), ("bert.embeddings.",))


def group_of(name: str) -> int:
    return next(i for i, parts in enumerate(GROUPS) if any(part in name for part in parts))


class Moves(pl.Callback):
    """By group, the optimizer steps (from 0) that moved it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.last = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.moved: dict[int, set[int]] = {i: set() for i in range(len(GROUPS))}
        self.states: dict[int, set[int]] = {}
        self.held: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step - 1
        named = dict(self.model.named_parameters())
        for name, parameter in named.items():
            if not torch.equal(parameter, self.last[name]):
                self.moved[group_of(name)].add(step)
                self.last[name] = parameter.detach().clone()
        state = trainer.optimizers[0].state
        self.states[step] = {group_of(name) for name, p in named.items() if state.get(p)}


def fit(one: Any, train: Callable[..., Any], tuning: Gradual, optimizer: Any, **settings: Any) -> Moves:
    context = one.context(steps=8)
    context.epoch = settings.pop("epoch", 2)
    effects = tuning.prepare(one.model, context)
    if settings.pop("pruned", False):
        effects.callbacks += Magnitude(schedule="cubic", end=0.5, interval=1).prepare(one.model, context).callbacks
    moves = Moves(one.model)
    train(one.learner(optimizer, steps=8), [one.batch()] * 8, callbacks=[*effects.callbacks, moves], **settings)
    return moves


OPTIMIZERS = [
    AdamW(lr=0.01, weight_decay=0.5), Adam(lr=0.01, weight_decay=0.5), SGD(lr=0.05, weight_decay=0.5),
    Adafactor(lr=0.01, weight_decay=0.5), Lion(lr=0.01, weight_decay=0.5), ScheduleFree(lr=0.01, weight_decay=0.5),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: type(one).__name__)
def test_each_group_moves_from_its_step_on_and_not_before(
    setting: Callable[..., Any], train: Callable[..., Any], optimizer: Any
) -> None:
    one = setting()
    moves = fit(one, train, Gradual(every=0.125), optimizer)  # a step of eight
    assert moves.moved == {i: set(range(i, 8)) for i in range(5)}
    if moves.states[7]:  # plain decay needs none
        assert moves.states == {step: set(range(min(step, 4) + 1)) for step in range(8)}
    assert moves.held == {id(p) for p in one.model.parameters()}


def test_an_epoch_is_the_usual_interval(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    moves = fit(one, train, Gradual(), AdamW(lr=0.01), epoch=1)  # eight epochs for five groups
    assert moves.moved == {i: set(range(i, 8)) for i in range(5)}


def test_a_fit_of_few_epochs_thaws_everything(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    moves = fit(one, train, Gradual(), AdamW(lr=0.01), epoch=4)  # at 0, 1.6, 3.2, 4.8 and 6.4
    assert [min(steps) for steps in moves.moved.values()] == [0, 2, 3, 5, 6]


def test_what_is_never_due_stays_out(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    moves = fit(one, train, Gradual(every=0.25), AdamW(lr=0.01))  # 0, 2, 4, 6, and 8, which never comes
    assert moves.moved == {0: set(range(8)), 1: set(range(2, 8)), 2: {4, 5, 6, 7}, 3: {6, 7}, 4: set()}
    embeddings = {id(p) for p in one.model.bert.embeddings.parameters()}
    assert moves.held == {id(p) for p in one.model.parameters()} - embeddings
    assert not any(p.requires_grad for p in one.model.bert.embeddings.parameters())


def test_moments_begin_when_a_group_thaws(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    """Adam's first step is as long as its rate: with a count or moments from before, it would not be."""
    one = setting()
    context = one.context(steps=4)
    effects = Gradual(every=0.5).prepare(one.model, context)
    weight = one.model.bert.encoder.layer[2].output.dense.weight
    steps: list[float] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.before = weight.detach().clone()

        def on_train_batch_end(self, *_: Any) -> None:
            steps.append(float((weight.detach() - self.before).abs().max()))

    train(one.learner(Adam(lr=0.01), steps=4), [one.batch()] * 4, callbacks=[*effects.callbacks, Look()])
    assert steps[:2] == [0.0, 0.0]
    assert steps[2] == pytest.approx(0.01, rel=1e-3)


def test_accumulated_batches_count_as_one_step(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    moves = fit(one, train, Gradual(every=0.25), AdamW(lr=0.01), accumulate_grad_batches=2)
    assert moves.moved == {0: {0, 1, 2, 3}, 1: {2, 3}, 2: set(), 3: set(), 4: set()}


def test_under_a_mask_it_is_the_base_weight_that_waits(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    moves = fit(setting(), train, Gradual(every=0.125), AdamW(lr=0.01, weight_decay=0.5), pruned=True)
    assert moves.moved == {i: set(range(i, 8)) for i in range(5)}


def test_refusals() -> None:
    for every in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"^tuning\.every="):
            Gradual(every=every)
