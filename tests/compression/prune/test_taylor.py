"""Gradient x weight: SNIP against autograd on the bare model, and what a fit gathers, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.prune.taylor import Taylor, TaylorMask
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.share.layers import Layers
from niwaki.errors import ConfigError
from niwaki.optimizer import SGD
from niwaki.stage import refuse_conflicts
from niwaki.tuning.freeze import train_only
from niwaki.tuning.full import Full
from niwaki.weights import links

ROWS: list[dict[str, list[Any]]] = [
    {"text": ["a pine", "no"], "label": ["yes", "no"]}, {"text": ["the old garden tree"], "label": ["maybe"]},
]  # fmt: skip


def snip(one: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """|w * d(sum of losses)/dw| of each target, by autograd alone, row by row."""
    model = one.model.eval()
    for batch in batches:
        for row in range(len(batch["labels"])):
            alone = {name: values[row : row + 1] for name, values in batch.items()}
            one.task.loss(model(**one.task.inputs(alone)), alone).backward()
    return {n: (m.weight.grad * m.weight).abs().detach() for n, m in one.context().targets.items()}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_at_once_it_is_snip(setting: Callable[..., Any], scope: Any, frozen: bool) -> None:
    one, other = setting(), setting()
    batches = [one.batch(rows) for rows in ROWS]
    expected = snip(other, batches)
    context = one.context()
    context.calibration = lambda count: batches
    if frozen:
        train_only(one.model, [])
    Taylor(sparsity=0.6, scope=scope).prepare(one.model.train(), context)
    every = torch.cat([s.flatten() for s in expected.values()])
    for name, linear in context.targets.items():
        mask, scores = links(linear)[0].mask, expected[name]
        of = every if scope == "global" else scores.flatten()
        threshold = of.sort().values[round(0.6 * of.numel())]
        torch.testing.assert_close(mask, scores >= threshold)
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert one.model.training
    assert type(links(linear)[0]) is not TaylorMask
    assert links(linear)[0].watcher is None


@pytest.mark.parametrize("shared", [False, True])
def test_along_the_fit_it_gathers_what_each_step_would_lose(
    setting: Callable[..., Any], train: Callable[..., Any], shared: bool
) -> None:
    one, twin = setting(), setting()
    for each in (one, twin):
        if shared:  # the gradients of both uses belong together
            Layers(lists=[[0, 2]]).prepare(each.model, each.context())
    context = one.context(steps=4)
    batches = [one.batch(rows) for rows in ROWS]
    stage = Taylor(sparsity=0.5, schedule="cubic", end=1.0, interval=3)
    effects = stage.prepare(one.model, context)
    train(one.learner(SGD(lr=0.05, momentum=0.0), [effects], 4), batches, callbacks=effects.callbacks)
    # the same two steps on a bare twin: nothing is masked before step 3
    gathered = {name: torch.zeros_like(linear.weight) for name, linear in twin.context().targets.items()}
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.05)
    for batch, rows in zip(batches, (2, 1), strict=True):
        optimizer.zero_grad()
        twin.model.train()
        twin.task.loss(twin.model(**twin.task.inputs(batch)), batch).backward()
        for name, linear in twin.context().targets.items():
            gathered[name] += rows * (linear.weight.grad * linear.weight).abs().detach()
        optimizer.step()
    masks = {name: links(linear)[0] for name, linear in context.targets.items()}
    for name, mask in masks.items():
        whole = gathered[name].max()
        torch.testing.assert_close(mask.gathered / whole, gathered[name] / whole, rtol=1e-2, atol=1e-4)
    scores = {name: mask.gathered.clone() for name, mask in masks.items()}  # type: ignore[operator, union-attr]
    effects.callbacks[1].draw(4)  # type: ignore[attr-defined]
    for name, mask in masks.items():
        threshold = scores[name].flatten().sort().values[scores[name].numel() // 2]
        assert torch.equal(mask.mask, scores[name] >= threshold)
        assert not mask.gathered.any()  # type: ignore[operator, union-attr]  # a new interval begins


def test_masked_weights_are_scored_too(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=4)
    effects = Taylor(sparsity=0.9, schedule="cubic", end=0.25, interval=1).prepare(one.model, context)
    train(one.learner(effects=[effects], steps=4), [one.batch()] * 2, callbacks=effects.callbacks)
    mask = links(context.targets["bert.encoder.layer.2.output.dense"])[0]
    assert int((~mask.mask).sum()) == round(0.9 * mask.mask.numel())  # type: ignore[operator]
    assert (mask.gathered[~mask.mask] > 0).float().mean() > 0.9  # type: ignore[operator, union-attr]


def test_a_gradient_that_overflowed_counts_nothing() -> None:
    mask = TaylorMask(torch.Size((1, 3)), torch.device("cpu"))
    mask.see(torch.tensor([[torch.inf, torch.nan, -2.0]]), torch.tensor([[1.0, 1.0, 3.0]]))
    mask.gather(4)
    mask.gather(4)  # nothing new
    assert mask.gathered.tolist() == [[0.0, 0.0, 24.0]]


def test_refusals() -> None:
    for fields, message in (
        ({"rows": 8, "schedule": "cubic"}, "rows: has no effect with schedule=cubic"), ({"rows": 0}, "rows=0: needs"),
        ({"when": "after_fit", "schedule": "rigl"}, "when: has no effect with schedule=rigl"),
        ({"when": "after_fit", "schedule": "cubic"}, "when: has no effect with schedule=cubic"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^compression\.taylor\.{message}") as caught:
            Taylor(**fields)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="prune/taylor after the fit and quantize/qat"):
        refuse_conflicts([Full(), Taylor(when="after_fit"), QAT()])
