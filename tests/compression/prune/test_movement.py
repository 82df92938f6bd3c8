"""Movement: scores are -lr * sum(w * dL/dw'), by hand and in a fit; the schedule of the paper; no decay, own rate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from niwaki.compression.prune.mask import MaskSchedule, mask_targets
from niwaki.compression.prune.movement import Movement, ScoredMask
from niwaki.errors import ConfigError
from niwaki.module import Learner
from niwaki.optimizer import SGD, AdamW
from niwaki.schedule import Constant
from niwaki.tuning.freeze import train_only
from niwaki.weights import links


def test_scores_by_hand() -> None:
    """y = sum_j w_j m_j x_j, L = y^2 / 2: dL/dw_j = y x_j m_j, dL/dS_j = y x_j w_j."""
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[2.0, -1.0]])
    mask = mask_targets({"it": linear}, ScoredMask)[linear]
    mask.take(torch.tensor([[True, False]]))
    x, rate, expected = torch.tensor([1.0, 3.0]), 0.1, [0.0, 0.0]
    weight = [2.0, -1.0]
    optimizer = torch.optim.SGD(linear.parameters(), lr=rate)
    for _ in range(3):
        optimizer.zero_grad()
        linear(x).square().div(2).sum().backward()
        optimizer.step()
        y = weight[0] * 1.0  # the other is masked
        expected = [s - rate * y * xj * wj for s, xj, wj in zip(expected, (1.0, 3.0), weight, strict=True)]
        weight[0] -= rate * y * 1.0
    assert mask.scores.tolist() == pytest.approx(expected)
    assert linear.parametrizations.weight.original.tolist() == [pytest.approx(weight)]  # type: ignore[union-attr]
    assert expected[1] > 0 > expected[0]  # w_0 moves to zero; that w_1 = -1 is away lets it grow: it should come back


def learner_of(one: Any, optimizer: Any, effects: Any, steps: int) -> Learner:
    return Learner(
        one.model, task=one.task, labels=one.labels, optimizer=optimizer, schedule=Constant(warmup=0.0), steps=steps,
        task_weight=1.0, terms=effects.terms, lr_factors=effects.lr_factors,
    )  # fmt: skip


class Gradients(pl.Callback):
    """sum(w * dL/dw') of each linear, with the gradients of a bare model whose weights are the masked ones."""

    def __init__(self, one: Any, twin: Any, linears: dict[str, Any]) -> None:
        self.one, self.twin, self.linears = one, twin, linears
        self.sums = {name: torch.zeros_like(links(linear)[0].matrix) for name, linear in linears.items()}
        self.away = {name: torch.zeros_like(links(linear)[0].mask) for name, linear in linears.items()}

    def on_train_batch_start(self, *_: Any) -> None:
        state = {
            name.replace("parametrizations.weight.original", "weight"): value
            for name, value in self.one.model.state_dict().items() if ".weight.0." not in name
        }  # fmt: skip
        self.twin.model.load_state_dict(state)
        bare = self.twin.context().targets
        for name, linear in bare.items():
            linear.weight.data *= links(self.linears[name])[0].mask
            linear.weight.grad = None
        batch = self.twin.batch()
        self.twin.task.loss(self.twin.model(**self.twin.task.inputs(batch)), batch).backward()
        for name, linear in self.linears.items():
            self.sums[name] += linear.parametrizations.weight.original.detach() * bare[name].weight.grad
            self.away[name] |= ~links(linear)[0].mask


@pytest.mark.parametrize(("start", "factor"), [("zero", 20.0), ("magnitude", 1e5)])
def test_in_a_fit_they_are_the_sum_of_steps(
    start: Any, factor: float, setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one = setting()
    context = one.context(steps=6)
    before = {name: linear.weight.detach().abs() for name, linear in context.targets.items()}
    effects = Movement(sparsity=0.6, start=start, begin=0.0, end=0.5, lr_factor=factor).prepare(one.model, context)
    watch = Gradients(one, setting(), context.targets)
    train(
        learner_of(one, SGD(lr=0.01, momentum=0.0), effects, 6), [one.batch()] * 6,
        callbacks=[*effects.callbacks, watch],
    )  # fmt: skip
    for name, linear in context.targets.items():
        mask = links(linear)[0]
        expected, size = -0.01 * factor * watch.sums[name], watch.sums[name].abs().max() * factor / 100
        if start == "magnitude":
            expected = expected + before[name]
        torch.testing.assert_close(mask.matrix / size, expected / size, rtol=1e-3, atol=1e-5)
        away = watch.away[name]  # masked in some step, and scored in it all the same
        assert 0 < int(away.sum()) < away.numel()
        moved = mask.matrix - before[name] if start == "magnitude" else mask.matrix
        assert bool((moved[away] != 0).float().mean() > 0.99)
        threshold = mask.matrix.flatten().sort().values[round(0.6 * mask.mask.numel())]
        assert torch.equal(mask.mask, mask.matrix >= threshold)
        assert int((linear.weight == 0).sum()) == round(0.6 * mask.mask.numel())


def test_the_share_that_is_left_follows_the_paper(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    """v(t) = v_f + (1 - v_f)(1 - (t - t_i) / (T - t_f - t_i))^3, with v_f = 0.2, t_i = 2, t_f = 2, T = 8."""
    one = setting()
    context = one.context(steps=8)
    effects = Movement(sparsity=0.8, begin=0.25, end=0.75).prepare(one.model, context)
    assert effects.settled == 6
    linear, counts = next(iter(context.targets.values())), []

    class Count(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(int(links(linear)[0].mask.sum()))

    train(learner_of(one, AdamW(lr=1e-4), effects, 8), [one.batch()] * 8, callbacks=[*effects.callbacks, Count()])
    left = [0.2 + 0.8 * (1 - min(max(t - 2, 0) / 4, 1)) ** 3 for t in range(1, 9)]
    assert counts == pytest.approx([share * 1024 for share in left], abs=1)


def test_which_weights_go_is_learned_to_the_end(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=10)
    effects = Movement(begin=0.0, end=0.2).prepare(one.model, context)
    masks, seen = [links(linear)[0] for linear in context.targets.values()], []

    class Keep(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(torch.cat([mask.mask.flatten() for mask in masks]))

    train(learner_of(one, AdamW(lr=1e-3), effects, 10), [one.batch()] * 10, callbacks=[*effects.callbacks, Keep()])
    assert any(not torch.equal(a, b) for a, b in pairwise(seen[5:]))


def test_scores_have_their_own_rate_and_no_decay(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    effects = Movement(lr_factor=50.0).prepare(one.model, context)
    optimizer = AdamW(lr=0.01, weight_decay=0.3).build(one.model, factors=effects.lr_factors)
    scores = {id(links(linear)[0].scores) for linear in context.targets.values()}
    assert len(scores) == len(effects.lr_factors) == 18
    found = [g for g in optimizer.param_groups if any(id(p) in scores for p in g["params"])]
    assert [(g["lr"], g["weight_decay"]) for g in found] == [(0.5, 0.0)]
    assert {id(p) for p in found[0]["params"]} == scores


def test_from_magnitude_the_smallest_go_first(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=10)
    weights = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    effects = Movement(sparsity=0.75, begin=0.0, end=0.1).prepare(one.model, context)
    assert set(effects.lr_factors.values()) == {10.0}
    (schedule,) = effects.callbacks
    assert isinstance(schedule, MaskSchedule)
    schedule.draw(1)
    for name, linear in context.targets.items():
        threshold = weights[name].abs().flatten().sort().values[round(0.75 * weights[name].numel())]
        assert torch.equal(links(linear)[0].mask, weights[name].abs() >= threshold)
    other = setting()
    zero = Movement(start="zero").prepare(other.model, other.context(steps=10))
    assert set(zero.lr_factors.values()) == {200.0}


def test_masks_alone_can_learn(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=4)
    train_only(one.model, [])
    effects = Movement(begin=0.0, end=0.5).prepare(one.model, context)
    before = {n: p.clone() for n, p in one.model.named_parameters()}
    train(learner_of(one, SGD(lr=0.1), effects, 4), [one.batch()] * 4, callbacks=effects.callbacks)
    changed = {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(effects.lr_factors)


def test_refusals(setting: Callable[..., Any]) -> None:
    for fields, message in (
        ({"lr_factor": 0.0}, "lr_factor=0.0"), ({"begin": 0.9}, "begin=0.9, end=0.8"), ({"interval": 0}, "interval=0"),
        ({"scope": "block"}, "scope='block'"), ({"start": "one"}, "start='one'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^compression\.movement\.{message}"):
            Movement(**fields)  # type: ignore[arg-type]
    assert "its scores are learned, which needs a fit" in Movement().needs_fit()
