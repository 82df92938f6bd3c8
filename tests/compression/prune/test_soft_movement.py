"""Soft movement: threshold, penalty and their schedule by hand, and in a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from niwaki.compression.prune.mask import cubic
from niwaki.compression.prune.movement import ScoredMask
from niwaki.compression.prune.soft_movement import SoftMovement, Threshold, above
from niwaki.errors import ConfigError
from niwaki.module import Learner
from niwaki.optimizer import AdamW
from niwaki.schedule import Constant
from niwaki.weights import links


def mask_with(scores: list[list[float]]) -> ScoredMask:
    mask = ScoredMask(torch.Size((len(scores), len(scores[0]))), torch.device("cpu"))
    mask.scores.data = torch.tensor(scores).flatten()
    return mask


def test_the_mask_is_a_threshold_on_the_sigmoid() -> None:
    # sigmoid(-2.197) = 0.1
    scores = torch.tensor([[-3.0, -2.2], [-2.19, 4.0]])
    assert above(scores, 0.1).int().tolist() == [[0, 0], [1, 1]]
    assert above(scores, 0.0).all()


def test_half_a_percent_stays_at_least() -> None:
    scores = torch.linspace(-20, -10, 400).view(20, 20)
    kept = above(scores, 0.1)
    assert int(kept.sum()) == 3  # int(0.005 * 400) + 1, as in the authors' code
    assert kept.flatten()[-3:].all()


def test_the_penalty_by_hand() -> None:
    """lambda(t) * mean over linears of mean sigmoid(S); lambda and threshold at 1 - (1 - t)^3 of their final value."""
    small, large = mask_with([[0.0, math.log(3)]]), mask_with([[0.0, 0.0, 0.0], [-math.log(3)] * 3])
    schedule = Threshold(
        [small, large], threshold=0.4, penalty=16.0, progress=cubic(1.0, 0.2, 0.8, 10), interval=1, last=10
    )
    means = ((0.5 + 0.75) / 2, (3 * 0.5 + 3 * 0.25) / 6)
    for step, share in ((0, 0.0), (2, 0.0), (5, 0.875), (8, 1.0), (9, 1.0)):  # 5 is half way: 1 - 0.5^3
        schedule.on_train_batch_start(SimpleNamespace(global_step=step))  # type: ignore[arg-type]
        assert float(schedule.term(None, {}).detach()) == pytest.approx(share * 16 * sum(means) / 2)
    schedule.draw(2)
    assert small.mask.all()
    assert large.mask.all()
    schedule.draw(5)  # at 0.35
    assert small.mask.tolist() == [[True, True]]
    assert large.mask.tolist() == [[True] * 3, [False] * 3]
    schedule.on_train_batch_start(SimpleNamespace(global_step=9))  # type: ignore[arg-type]
    schedule.term(None, {}).backward()
    # 16 / 2 linears / 2 weights * sigmoid'(S): 1/4 at 0, 3/16 at log 3
    assert small.scores.grad.tolist() == pytest.approx([1.0, 0.75])  # type: ignore[union-attr]


def fit(setting: Callable[..., Any], train: Callable[..., Any], penalty: float) -> float:
    """The sparsity that a penalty leads to."""
    one = setting()
    context = one.context(steps=12)
    effects = SoftMovement(penalty=penalty, begin=0.0, end=0.5, lr_factor=300.0).prepare(one.model, context)
    assert effects.settled == 6
    learner = Learner(
        one.model, task=one.task, labels=one.labels, optimizer=AdamW(lr=1e-3), schedule=Constant(warmup=0.0), steps=12,
        task_weight=1.0, terms=effects.terms, lr_factors=effects.lr_factors,
    )  # fmt: skip
    drawn: list[int] = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            drawn.append(effects.callbacks[0].state_dict()["drawn"])

    train(learner, [one.batch()] * 12, callbacks=[*effects.callbacks, Count()])
    assert drawn == list(range(1, 13))
    masks: list[Any] = [links(linear)[0] for linear in context.targets.values()]
    for mask, linear in zip(masks, context.targets.values(), strict=True):
        assert torch.equal(mask.mask, above(mask.matrix, 0.1))
        assert torch.equal(linear.weight == 0, ~mask.mask)
    return float(torch.cat([(~mask.mask).float().flatten() for mask in masks]).mean())


def test_the_penalty_makes_it_sparse(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    low, high = fit(setting, train, 1e-3), fit(setting, train, 10.0)
    assert low < 0.6 < 0.9 < high


def test_refusals(setting: Callable[..., Any]) -> None:
    for fields, name in (
        ({"threshold": 0.0}, "threshold=0.0"), ({"threshold": 1.0}, "threshold=1.0"), ({"penalty": 0.0}, "penalty=0.0"),
        ({"begin": 1.0}, "begin=1.0"), ({"lr_factor": -1.0}, "lr_factor=-1.0"), ({"targets": "("}, "targets="),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^compression\.soft_movement\.{name}"):
            SoftMovement(**fields)  # type: ignore[arg-type]
    one = setting()
    assert "needs a fit" in SoftMovement().needs_fit()
    with pytest.raises(ConfigError, match="this family of models has no feed_gate"):
        SoftMovement(targets=["feed_gate"]).check(one.context().anatomy, one.context().targets)
