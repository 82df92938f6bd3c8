"""RigL by hand: the cosine, which connections move, where new ones begin, and in a fit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.mask import Mask, mask_targets
from niwaki.compression.prune.pattern import Pattern
from niwaki.compression.prune.random import Random
from niwaki.compression.prune.rigl import RigL, moved, share_at
from niwaki.errors import ConfigError
from niwaki.optimizer import SGD, AdamW
from niwaki.stage import refuse_conflicts
from niwaki.tuning.bitfit import BitFit
from niwaki.tuning.dora import DoRA
from niwaki.tuning.head import Head
from niwaki.tuning.layernorm import LayerNorm
from niwaki.tuning.lora import LoRA
from niwaki.tuning.top import Top
from niwaki.weights import fold, links


def test_the_cosine_at_points_worked_by_hand() -> None:
    # f(t) = a / 2 (1 + cos(pi t / T)), a = 0.3: whole at 0, half at T / 2, (1 + cos 60 degrees) / 2 = 3/4 at T / 3
    assert [share_at(step, 12, 0.3) for step in (0, 4, 6, 12)] == pytest.approx([0.3, 0.225, 0.15, 0.0])


def test_which_connections_move() -> None:
    kept = torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()
    magnitudes = torch.tensor([[5.0, 0.1, 0.2], [9.0, 9.0, 9.0]])
    gradients = torch.tensor([[9.0, 1.0, 0.0], [-4.0, 0.5, 0.1]])
    assert moved(kept, magnitudes, gradients, 0).int().tolist() == [[1, 1, 1], [0, 0, 0]]
    # 0.1 goes; of what is away the gradient of -4 is the largest, though not the largest of all
    assert moved(kept, magnitudes, gradients, 1).int().tolist() == [[1, 0, 1], [1, 0, 0]]
    # 0.1 and 0.2 go; -4 comes, and the one that just went with gradient 1 comes back before 0.5
    assert moved(kept, magnitudes, gradients, 2).int().tolist() == [[1, 1, 0], [1, 0, 0]]


def layer(weight: list[list[float]], mask: list[list[int]]) -> tuple[nn.Linear, Mask]:
    linear = nn.Linear(len(weight[0]), len(weight), bias=False)
    linear.weight.data = torch.tensor(weight)
    found = mask_targets({"it": linear}, Mask)[linear]
    found.take(torch.tensor(mask).bool())
    return linear, found


def test_one_move_worked_by_hand() -> None:
    linear, mask = layer([[1.0, 0.1, 7.0, 8.0], [2.0, 3.0, 6.0, 5.0]], [[1, 1, 0, 0], [1, 1, 0, 0]])
    base = linear.parametrizations.weight.original  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW([base])
    schedule = RigL({linear: mask}, pattern=Pattern(), fraction=0.5, first=0, last=8, interval=2)
    trainer: Any = SimpleNamespace(global_step=1, optimizers=[optimizer])
    schedule.on_train_batch_start(trainer)
    # y = W' x of x = (1, 1, 10, 1): dL/dW' is x in each row, times 1 and -3
    (torch.tensor([1.0, -3.0]) * linear(torch.tensor([1.0, 1.0, 10.0, 1.0]))).sum().backward()  # type: ignore[no-untyped-call]
    assert base.grad.tolist() == [[1, 1, 0, 0], [-3, -3, 0, 0]]
    optimizer.step()
    optimizer.state[base]["exp_avg"].fill_(1.0)
    base.data = torch.tensor([[1.0, 0.1, 7.0, 8.0], [2.0, 3.0, 6.0, 5.0]])
    trainer.global_step = 2
    schedule.on_train_batch_end(trainer)
    # 4 connections; 0.5 / 2 (1 + cos(2 pi / 8)) * 4 = 1.71, so 2 move: 0.1 and 1.0 go, gradients -30 and 10 come
    assert mask.mask.int().tolist() == [[0, 0, 1, 0], [1, 1, 1, 0]]
    assert linear.weight.tolist() == [[0, 0, 0, 0], [2, 3, 0, 0]]  # new ones begin at zero
    assert base.tolist() == [[1.0, pytest.approx(0.1), 0, 8], [2, 3, 0, 5]]
    assert optimizer.state[base]["exp_avg"].tolist() == [[1, 1, 0, 1], [1, 1, 0, 1]]  # without momentum


def test_what_stays_zero_in_gradient_is_dense_only_when_it_is_due() -> None:
    linear, mask = layer([[1.0, 2.0]], [[1, 0]])
    schedule = RigL({linear: mask}, pattern=Pattern(), fraction=0.5, first=4, last=12, interval=3)
    due = [step for step in range(20) if schedule.due(step)]
    assert due == [6, 9]
    trainer: Any = SimpleNamespace(global_step=4, optimizers=[])
    schedule.on_train_batch_start(trainer)
    assert mask.watcher is None
    trainer.global_step = 5
    schedule.on_train_batch_start(trainer)
    assert mask.watcher is not None
    schedule.load_state_dict({"done": 6})
    assert [step for step in range(20) if schedule.due(step)] == [9]


def test_blocks_move_as_blocks() -> None:
    linear, mask = layer(
        [[1.0, 1.0, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0], [4.0] * 4, [4.0] * 4], [[1] * 4] * 2 + [[0] * 4] * 2
    )
    schedule = RigL({linear: mask}, pattern=Pattern(height=2, width=2), fraction=1.0, first=0, last=9, interval=3)
    schedule._gradients = {mask: torch.tensor([[0.0] * 4, [0.0] * 4, [0.0, 0, 5, 0], [1.0, 0, 0, 0]])}
    schedule.move(3, [])  # 1 / 2 (1 + cos(60 degrees)) of two blocks: 1.5, so both
    assert mask.mask.int().tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


class Watch(pl.Callback):
    def __init__(self, masks: list[Any]) -> None:
        self.masks, self.seen = masks, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append([mask.mask.clone() for mask in self.masks])


@pytest.mark.parametrize("optimizer", [SGD(lr=0.05), AdamW(lr=0.01)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_a_fit_the_count_stays_and_the_places_move(
    setting: Callable[..., Any], train: Callable[..., Any], optimizer: Any, accumulate: int
) -> None:
    one = setting("bert", "ner")
    context = one.context(steps=8)
    stage = Random(sparsity=0.75, schedule="rigl", interval=2, fraction=0.5)
    effects = stage.prepare(one.model, context)
    assert effects.settled == 6
    masks = [links(linear)[0] for linear in context.targets.values()]
    watch = Watch(masks)
    first = [mask.mask.clone() for mask in masks]  # type: ignore[union-attr, operator]
    batches = [one.batch()] * 8 * accumulate
    train(
        one.learner(optimizer, [effects], 8), batches, callbacks=[*effects.callbacks, watch],
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    seen = [first, *watch.seen[accumulate - 1 :: accumulate]]
    for step in range(1, 9):
        changed = any(not torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
        assert changed == (step in (2, 4)), step
        assert all(int((~m).sum()) == round(0.75 * m.numel()) for m in seen[step])


def test_the_largest_gradients_are_those_of_the_loss(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    """Against autograd on the same weights, with everything unmasked but zero."""
    one = setting()
    context = one.context(steps=8)
    effects = Magnitude(sparsity=0.5, schedule="rigl", interval=2, fraction=1.0).prepare(one.model, context)
    schedule, found = effects.callbacks[0], {}
    expected: dict[Any, torch.Tensor] = {}

    class Compare(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                twin = setting()
                state = {
                    name.replace("parametrizations.weight.original", "weight"): tensor
                    for name, tensor in one.model.state_dict().items() if not name.endswith("mask")
                }  # fmt: skip
                twin.model.load_state_dict(state)
                for name, linear in twin.context().targets.items():
                    linear.weight.data *= links(context.targets[name])[0].mask
                twin.task.loss(twin.model(**twin.task.inputs(twin.batch())), twin.batch()).backward()
                expected.update({name: linear.weight.grad for name, linear in twin.context().targets.items()})

    move = schedule.move
    schedule.move = lambda step, optimizers: (found.update(schedule._gradients), move(step, optimizers))  # type: ignore[attr-defined]
    train(one.learner(effects=[effects], steps=8), [one.batch()] * 2, callbacks=[Compare(), *effects.callbacks])
    for name, linear in context.targets.items():
        torch.testing.assert_close(found[links(linear)[0]], expected[name], rtol=1e-3, atol=1e-7)


def test_below_a_delta_new_ones_begin_at_zero_too(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=4)
    lora = LoRA(rank=2)
    lora.prepare(one.model, context)
    lora.link(one.model, context)
    effects = Magnitude(schedule="rigl", interval=2, fraction=1.0).prepare(one.model, context)
    masks = {name: links(linear)[-1] for name, linear in context.targets.items()}
    before = {name: mask.mask.clone() for name, mask in masks.items()}  # type: ignore[union-attr, operator]
    train(one.learner(SGD(lr=0.5), effects=[effects], steps=4), [one.batch()] * 2, callbacks=effects.callbacks)
    grown = {name: mask.mask & ~before[name] for name, mask in masks.items()}  # type: ignore[operator]
    assert all(new.any() for new in grown.values())
    for name, linear in context.targets.items():
        assert linear.weight[grown[name]].abs().max() < 1e-6
    fold(context.targets)


def test_nothing_moves_where_the_weights_rest(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=4)
    Top(blocks=1).prepare(one.model, context)
    effects = Magnitude(schedule="rigl", interval=2, fraction=1.0).prepare(one.model, context)
    before = {name: links(linear)[0].mask.clone() for name, linear in context.targets.items()}
    train(one.learner(SGD(lr=0.05), [effects], 4), [one.batch()] * 4, callbacks=effects.callbacks)
    moved = {name for name, linear in context.targets.items() if not torch.equal(links(linear)[0].mask, before[name])}
    assert moved == {name for name in context.targets if ".layer.2." in name}


def test_refusals(setting: Callable[..., Any]) -> None:
    for fields, message in (
        ({"pattern": "2:4"}, "would leave the pattern 2:4"), ({"scope": "row"}, "leave their row"),
        ({"fraction": 0.0}, r"fraction=0.0: needs"), ({"rounds": 2}, "rounds: has no effect with schedule=rigl"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Magnitude(schedule="rigl", **fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tuning=dora and prune/magnitude: the base weight changes"):
        refuse_conflicts([DoRA(), Magnitude(schedule="rigl")])
    for frozen in (Head(), BitFit(), LayerNorm()):
        with pytest.raises(ConfigError, match=r"and prune/magnitude with \S+schedule=rigl: none of the pruned weights"):
            refuse_conflicts([frozen, Magnitude(schedule="rigl")])
    one = setting()
    Top(blocks=1).prepare(one.model, one.context())
    with pytest.raises(ConfigError, match="schedule=rigl: none of the weights that targets names learns"):
        Magnitude(schedule="rigl", targets=r".*layer\.0\..*").prepare(one.model, one.context())
    with pytest.raises(ConfigError, match=r"interval=100: no connection would move in a fit of 10 optimizer steps"):
        Magnitude(schedule="rigl", interval=100).check_steps(10)
    Magnitude(schedule="rigl", interval=5).check_steps(10)
