"""Iterative pruning with rewinding: shares by hand, values put back, an optimizer that forgot, in a fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.pattern import keep_largest
from niwaki.compression.prune.random import Random
from niwaki.compression.prune.rewind import left_after
from niwaki.errors import ConfigError
from niwaki.optimizer import AdamW
from niwaki.stage import refuse_conflicts
from niwaki.tuning.adalora import AdaLoRA
from niwaki.weights import links


def test_each_round_drops_the_same_share() -> None:
    # 1/8 is left in the end: a half of the rest goes each time
    assert [left_after(r, 3, 0.875) for r in (0, 1, 2, 3)] == pytest.approx([1, 0.5, 0.25, 0.125])


class Watch(pl.Callback):
    """What learns before and after each step, and the masks."""

    def __init__(self, model: Any, masks: list[Any], last: Any) -> None:
        self.model, self.masks, self.last = model, masks, last
        self.values: dict[int, dict[str, torch.Tensor]] = {}
        self.drawn: dict[int, list[torch.Tensor]] = {}
        self.moments: dict[int, int] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.values[trainer.global_step] = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.drawn[trainer.global_step] = [mask.mask.clone() for mask in self.masks]
        self.moments[trainer.global_step] = len(trainer.optimizers[0].state)


def test_in_a_fit(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=12)
    stage = Magnitude(sparsity=0.875, schedule="rewind", begin=0.25, end=0.75, rounds=3)
    effects = stage.prepare(one.model, context)
    assert effects.settled == 9
    masks = [links(linear)[0] for linear in context.targets.values()]
    watch = Watch(one.model, masks, next(iter(context.targets.values())))
    kept_before_step: dict[int, torch.Tensor] = {}

    class Before(pl.Callback):
        """Stands before the schedule: the weights that the fit has reached."""

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            kept_before_step[trainer.global_step] = watch.last.parametrizations.weight.original.detach().clone()

    train(
        one.learner(AdamW(lr=0.01), [effects], 12), [one.batch()] * 12,
        callbacks=[Before(), *effects.callbacks, watch],
    )  # fmt: skip
    # origin: step 3; rounds end at 5, 7 and 9
    total = masks[0].mask.numel()  # type: ignore[union-attr, operator]
    left = {step: int(drawn[0].sum()) for step, drawn in watch.drawn.items()}
    half, quarter, eighth = (total - round(share * total) for share in (0.5, 0.75, 0.875))
    assert [left[step] for step in range(12)] == [total] * 5 + [half] * 2 + [quarter] * 2 + [eighth] * 3
    for step in (5, 7, 9):
        assert all(torch.equal(watch.values[step][name], value) for name, value in watch.values[3].items())
        assert watch.moments[step] == 0
        assert watch.moments[step + 1] > 0
    for step in (4, 6, 8, 10):
        changed = [n for n, v in watch.values[3].items() if not torch.equal(watch.values[step][n], v)]
        assert any("classifier" in name for name in changed)
        assert any("original" in name for name in changed)
    # each mask by hand: the largest of what the round ended with, among what was left
    scores = kept_before_step[7].abs().masked_fill(~watch.drawn[5][0], -1.0).flatten()[None]
    assert torch.equal(watch.drawn[7][0], keep_largest(scores, total - quarter).view_as(watch.drawn[7][0]))
    for earlier, later in ((5, 7), (7, 9)):
        assert not (watch.drawn[later][0] & ~watch.drawn[earlier][0]).any()


def test_what_learns_beside_the_model_goes_back_too(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    """A learned map of a distillation: it is rewound with the model, whose optimizer forgets it as well."""
    one, beside = setting(), torch.nn.Linear(3, 1)
    effects = Magnitude(schedule="rewind", begin=0.5, end=1.0, rounds=1).prepare(one.model, one.context(steps=4))
    effects.modules["map"] = beside
    effects.terms["map"] = lambda outputs, batch: beside(outputs.logits).square().mean()
    values: list[torch.Tensor] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            values.append(beside.weight.detach().clone())

    learner = one.learner(AdamW(lr=0.1), [effects], 4)
    train(learner, [one.batch()] * 4, callbacks=[*effects.callbacks, Keep()])
    assert torch.equal(values[3], values[1])  # rewound after the fourth step to what it was after the second
    assert not torch.equal(values[2], values[1])


def test_from_the_very_start(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    """begin=0: the lottery ticket's initialization."""
    one = setting()
    context = one.context(steps=6)
    effects = Random(schedule="rewind", rounds=2).prepare(one.model, context)
    assert effects.settled == 4  # three stretches of two steps
    initial = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(effects=[effects], steps=6), [one.batch()] * 4, callbacks=effects.callbacks)
    assert all(torch.equal(p, initial[n]) for n, p in one.model.named_parameters())
    assert all(int((~links(m)[0].mask).sum()) == m.weight.numel() // 2 for m in context.targets.values())  # type: ignore[operator]


def test_accumulated_batches_rewind_once(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=4)
    effects = Magnitude(schedule="rewind", rounds=1).prepare(one.model, context)
    initial = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(
        one.learner(effects=[effects], steps=4), [one.batch()] * 6, callbacks=effects.callbacks,
        accumulate_grad_batches=2,
    )  # fmt: skip
    assert any(not torch.equal(p, initial[n]) for n, p in one.model.named_parameters())


def test_refusals(setting: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"rounds=0: needs a whole number"):
        Magnitude(schedule="rewind", rounds=0)
    with pytest.raises(ConfigError, match=r"interval: has no effect with schedule=rewind"):
        Magnitude(schedule="rewind", interval=2)
    with pytest.raises(ConfigError, match=r"rounds=9: a fit of 5 optimizer steps has no room"):
        Magnitude(schedule="rewind", rounds=9).check_steps(5)
    Magnitude(schedule="rewind", rounds=3).check_steps(4)
    with pytest.raises(
        ConfigError, match=r"tuning=adalora and prune/magnitude with .*schedule=rewind: what the tuning"
    ):
        refuse_conflicts([AdaLoRA(), Magnitude(schedule="rewind")])
    assert "schedule=rewind: needs a fit" in str(Magnitude(schedule="rewind").needs_fit())
