"""Magnitude pruning on models: exact counts, before, while and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.prune.magnitude import Magnitude, magnitude
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.optimizer import SGD, AdamW
from niwaki.task.classification import Classification
from niwaki.weights import fold, links


def zeros(linear: Any) -> int:
    return int((linear.weight == 0).sum())


def test_the_score() -> None:
    assert magnitude(torch.tensor([-2.0, 0.0, 1.5])).tolist() == [2.0, 0.0, 1.5]


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_layer_scope_keeps_the_largest_of_each_target(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    context = one.context()
    dense = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    effects = Magnitude(sparsity=0.3).prepare(one.model, context)
    assert effects.settled == 0
    for name, linear in context.targets.items():
        drop = round(0.3 * linear.weight.numel())
        threshold = dense[name].abs().flatten().sort().values[drop]
        expected = torch.where(dense[name].abs() >= threshold, dense[name], 0.0)
        assert zeros(linear) == drop
        assert torch.equal(linear.weight, expected)


def test_global_scope_has_one_threshold(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    for index, linear in enumerate(context.targets.values()):
        linear.weight.data *= 1 + index
    dense = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    everything = torch.cat([weight.abs().flatten() for weight in dense.values()])
    threshold = everything.sort().values[round(0.4 * len(everything))]
    Magnitude(sparsity=0.4, scope="global").prepare(one.model, context)
    for name, linear in context.targets.items():
        assert torch.equal(linear.weight, torch.where(dense[name].abs() >= threshold, dense[name], 0.0))
    assert len({zeros(linear) / linear.weight.numel() for linear in context.targets.values()}) > 1


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("unstructured", 0.5)])
def test_sparsity_follows_from_the_pattern(setting: Callable[..., Any], pattern: str, sparsity: float) -> None:
    one = setting()
    context = one.context()
    stage = Magnitude(pattern=pattern)
    assert stage.final_sparsity == sparsity
    stage.prepare(one.model, context)
    assert all(zeros(linear) == sparsity * linear.weight.numel() for linear in context.targets.values())


def test_nothing_but_the_targets_is_touched(setting: Callable[..., Any]) -> None:
    one, plain = setting(), setting()
    context = one.context()
    Magnitude(sparsity=0.9).prepare(one.model, context)
    fold(context.targets)
    weights = {f"{name}.weight" for name in context.targets}
    state = plain.model.state_dict()
    changed = {name for name, tensor in one.model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == weights


@pytest.mark.parametrize("optimizer", [SGD(lr=0.1, momentum=0.9, weight_decay=0.1), AdamW(lr=0.01, weight_decay=0.1)])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masks_stay_exact_through_training(
    setting: Callable[..., Any], train: Callable[..., Any], optimizer: Any, pattern: str
) -> None:
    one = setting("bert", "ner")
    context = one.context(steps=3)
    effects = Magnitude(sparsity=0.5, pattern=pattern).prepare(one.model, context)
    before = {name: links(linear)[0].mask.clone() for name, linear in context.targets.items()}
    weights = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    train(
        one.learner(optimizer, [effects], 3), [one.batch()] * 6, callbacks=effects.callbacks,
        accumulate_grad_batches=2, gradient_clip_val=1.0,
    )  # fmt: skip
    fold(context.targets)
    for name, linear in context.targets.items():
        assert torch.equal(linear.weight == 0, ~before[name])
        assert zeros(linear) == linear.weight.numel() // 2
        assert not torch.equal(linear.weight, weights[name])


def test_the_cubic_schedule_in_a_fit(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=8)
    effects = Magnitude(sparsity=0.8, schedule="cubic", begin=0.0, end=0.5, interval=2).prepare(one.model, context)
    assert effects.settled == 4
    linear = next(iter(context.targets.values()))
    counts: list[int] = []

    class Watch(type(effects.callbacks[0]).__mro__[1]):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(zeros(linear))

    assert zeros(linear) == 0
    train(one.learner(effects=[effects], steps=8), [one.batch()] * 8, callbacks=[*effects.callbacks, Watch()])
    half, whole = round(0.8 * (1 - 0.5**3) * 1024), round(0.8 * 1024)
    assert counts == [0, half, half, whole, whole, whole, whole, whole]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_fit_still_ends_sparse(setting: Callable[..., Any], train: Callable[..., Any], steps: int) -> None:
    one = setting()
    context = one.context(steps=steps)
    effects = Magnitude(sparsity=0.6, schedule="cubic", begin=0.3, end=0.4).prepare(one.model, context)
    train(one.learner(effects=[effects], steps=steps), [one.batch()] * steps, callbacks=effects.callbacks)
    assert all(zeros(linear) == round(0.6 * linear.weight.numel()) for linear in context.targets.values())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sparsity": 0.0}, "sparsity"), ({"sparsity": 1.0}, "sparsity"), ({"sparsity": 50}, "sparsity"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity"), ({"pattern": "4:2"}, "pattern"),
        ({"scope": "block"}, "scope"), ({"pattern": "2:4", "scope": "global"}, "scope"),
        ({"schedule": "linear"}, "schedule"), ({"schedule": "cubic", "begin": 0.5, "end": 0.5}, "begin"),
        ({"schedule": "cubic", "end": 1.5}, "begin"),
        ({"schedule": "cubic", "begin": -0.1}, "begin"), ({"schedule": "cubic", "interval": 0}, "interval"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.magnitude\.{name}=") as caught:
        Magnitude(**fields)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_does_not_fit_is_refused_on_the_empty_model() -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=r"pattern=2:5: bert\.encoder\.layer\.0\.\S+ has 32 inputs, which 5 does not"):
        Magnitude(pattern="2:5").check(anatomy, anatomy.linears())
    Magnitude(pattern="2:4").check(anatomy, anatomy.linears())


def test_settings_of_a_schedule_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"compression\.magnitude\.end: has no effect with schedule=one_shot"):
        Magnitude(end=0.5)
