"""Random pruning: exact counts, the seed alone decides, and what went stays away."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from niwaki.compression.prune.random import Random
from niwaki.optimizer import SGD
from niwaki.weights import links


def masks_of(one: Any, stage: Random, seed: int = 0, steps: int = 0) -> tuple[list[torch.Tensor], Any, Any]:
    context = one.context(steps=steps)
    context.seed = seed
    effects = stage.prepare(one.model, context)
    return [links(linear)[0].mask for linear in context.targets.values()], effects, context  # type: ignore[misc]


def test_counts_and_seeds(setting: Callable[..., Any]) -> None:
    first, again, other = (masks_of(setting(), Random(sparsity=0.3), seed)[0] for seed in (1, 1, 2))
    assert all(int((~mask).sum()) == round(0.3 * mask.numel()) for mask in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])  # nor do two linears of one shape have the same


def test_weights_do_not_matter(setting: Callable[..., Any]) -> None:
    one, scaled = setting(), setting(seed=5)
    assert all(torch.equal(a, b) for a, b in zip(*(masks_of(m, Random())[0] for m in (one, scaled)), strict=True))


def test_masks_are_nested_along_the_fit(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    masks, effects, _ = masks_of(one, Random(sparsity=0.8, schedule="cubic", end=1.0, interval=1), steps=4)
    seen = []
    schedule = effects.callbacks[0]
    draw = schedule.draw
    schedule.draw = lambda step: (draw(step), seen.append([m.clone() for m in masks]))
    train(one.learner(SGD(lr=0.5), [effects], 4), [one.batch()] * 4, callbacks=effects.callbacks)
    assert len(seen) == 4
    for earlier, later in pairwise(seen):
        assert not any((new & ~old).any() for old, new in zip(earlier, later, strict=True))
    assert all(int((~m).sum()) == round(0.8 * m.numel()) for m in seen[-1])
