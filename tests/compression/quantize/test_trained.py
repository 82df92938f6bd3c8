"""Scales that learn, begin and are held: LSQ's and PACT's gradients by hand, and what a checkpoint brings back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from niwaki import compose
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.layout import Layout
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.quantize.trained import InputGrid, LearnedStep, TrainedGrid
from niwaki.errors import ConfigError
from niwaki.weights import fold, links


@pytest.mark.parametrize("step", [0.3, 0.05])
def test_the_gradients_of_a_learned_step_by_hand(step: float) -> None:
    """Equation 3 of the paper, value by value; the gain is 1 / sqrt(values * q)."""
    values, s = torch.randn(2, 6, requires_grad=True), torch.full((2, 1), step, requires_grad=True)
    gain = 1 / math.sqrt(6 * 7)
    upstream = torch.randn(2, 6)
    found = LearnedStep.apply(values, s, -7, 7, gain)
    found.backward(upstream)
    found, given = found.detach(), values.detach()
    for row in range(2):
        of_step = 0.0
        for column in range(6):
            v = float(given[row, column]) / step
            code = max(-7, min(7, round(v)))
            assert float(found[row, column]) == pytest.approx(code * step, abs=1e-6)
            g = float(upstream[row, column])
            assert float(values.grad[row, column]) == pytest.approx(g if -7 <= v <= 7 else 0.0)  # type: ignore[index]
            of_step += g * (code - v if -7 <= v <= 7 else code) * gain
        assert float(s.grad[row, 0]) == pytest.approx(of_step, rel=1e-4, abs=1e-6)  # type: ignore[index]


def test_scales_start_where_the_paper_says() -> None:
    weight = torch.randn(4, 16)
    grid = TrainedGrid(weight.shape, Layout(bits=4, group=8), "lsq", 8, "lsq", begun=False)
    assert torch.equal(grid(weight), weight)
    grid.begin(weight)
    expected = [2 * sum(map(abs, half)) / 8 / math.sqrt(7) for row in weight.tolist() for half in (row[:8], row[8:])]
    assert grid.step.tolist() == pytest.approx(expected, rel=1e-5)
    assert grid.inputs is not None
    values = torch.randn(3, 16)
    grid.train()
    grid.enter(values)
    assert grid.inputs.learned.item() == pytest.approx(2 * float(values.abs().mean()) / math.sqrt(127), rel=1e-5)
    grid.enter(values * 9)
    assert grid.inputs.learned.item() == pytest.approx(2 * float(values.abs().mean()) / math.sqrt(127), rel=1e-5)


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (3, None)])
def test_the_gain_is_that_of_the_weights_that_share_a_step(bits: int, group: int | None) -> None:
    """Section 2.2: 1 / sqrt(N q), N the weights of the channel or group, q the last code; of inputs, N features."""
    weight, upstream, last = torch.randn(4, 16), torch.randn(4, 16), 2 ** (bits - 1) - 1
    grid = TrainedGrid(weight.shape, Layout(bits=bits, group=group), "lsq", bits, "lsq", begun=True)
    grid.begin(weight)
    grid(weight).backward(upstream)
    size = group or 16
    for place, step in enumerate(grid.step.tolist()):
        values, pulls = (one.flatten()[place * size : (place + 1) * size].tolist() for one in (weight, upstream))
        slopes = [round(v / step) - v / step if abs(v / step) <= last else math.copysign(last, v) for v in values]
        expected = sum(g * slope for g, slope in zip(pulls, slopes, strict=True)) / math.sqrt(size * last)
        assert float(grid.step.grad[place]) == pytest.approx(expected, rel=1e-3, abs=1e-5)  # type: ignore[index]
    assert grid.inputs is not None
    values, inputs = torch.randn(2, 3, 16), grid.inputs.train()
    found = inputs(values)
    found.backward(torch.ones_like(found))
    step = inputs.learned.item()
    ratios = [v / step for v in values.flatten().tolist()]
    of_all = sum(round(r) - r if abs(r) <= last else math.copysign(last, r) for r in ratios)
    assert float(inputs.learned.grad) == pytest.approx(of_all / math.sqrt(16 * last), rel=1e-3, abs=1e-4)  # type: ignore[arg-type]


def test_pact_learns_its_end_from_what_lies_beyond_it() -> None:
    grid = InputGrid(4, "pact")
    grid.train()
    first = torch.tensor([[0.5, -2.0, 1.0]])
    grid(first)
    assert grid.learned.item() == 2.0
    values = torch.tensor([[5.0, -3.0, 0.7, -0.2]], requires_grad=True)
    found = grid(values)
    assert found.tolist()[0] == pytest.approx([2.0, -2.0, round(0.7 * 3.5) / 3.5, round(-0.2 * 3.5) / 3.5], abs=1e-6)
    found.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert float(grid.learned.grad) == 1.0 - 10.0  # type: ignore[arg-type]
    assert values.grad.tolist()[0] == [0.0, 0.0, 100.0, 1000.0]  # type: ignore[union-attr]


def test_an_end_of_pact_decays_while_it_learns(setting: Callable[..., Any]) -> None:
    """Section 3: lambda times the square of each end joins the loss, so its slope is 2 lambda a."""
    one = setting()
    effects = QAT(activation_scale="pact", pact_decay=0.25).prepare(one.model, one.context())
    decay = effects.terms["pact"]
    assert float(decay(None, {})) == 0.0  # nothing is drawn yet
    one.model.train()
    one.model(**one.task.inputs(one.batch()))
    grids = [link for linear in one.context().targets.values() for link in links(linear)]
    ends = [grid.inputs.learned for grid in grids if isinstance(grid, TrainedGrid) and grid.inputs is not None]
    decay(None, {}).backward()
    assert len(ends) == len(one.context().targets)
    for end in ends:
        assert float(end.grad) == pytest.approx(2 * 0.25 * end.item())
    for linear, grid in list(zip(one.context().targets.values(), grids, strict=True))[1:]:
        grid.hold(linear.weight)
    assert decay(None, {}).item() == pytest.approx(0.25 * ends[0].item() ** 2)


def test_only_pact_decays(setting: Callable[..., Any]) -> None:
    for stage in (QAT(activation_scale="lsq"), QAT(scale="lsq"), QAT(activation_scale="pact", pact_decay=0.0)):
        one = setting()
        assert not stage.prepare(one.model, one.context()).terms


def test_an_observed_range_is_the_moving_average_of_what_was_seen() -> None:
    """Jacob et al., section 3.1: of what enters before the grid begins too; not in eval mode, nor once held."""
    grid = TrainedGrid(torch.Size((2, 3)), Layout(bits=8), "absmax", 4, "observed", begun=False).train()
    first, second = torch.tensor([[0.5, -2.0, 1.0]]), torch.tensor([[5.0, -3.0, 0.7]], requires_grad=True)
    assert torch.equal(grid.enter(first), first)
    assert grid.inputs is not None
    assert not list(grid.inputs.parameters())
    assert grid.inputs.learned.item() == 2.0
    grid.begin(torch.ones(2, 3))
    found = grid.enter(second)
    end = 2.0 + 0.01 * (5.0 - 2.0)
    assert grid.inputs.learned.item() == pytest.approx(end)
    assert found.tolist()[0] == pytest.approx([end, -end, round(0.7 * 7 / end) * end / 7])
    found.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert second.grad is not None
    assert second.grad.tolist()[0] == [0.0, 0.0, 100.0]
    grid.eval().enter(torch.full((1, 3), 50.0))
    assert grid.inputs.learned.item() == pytest.approx(end)
    grid.train().hold(torch.ones(2, 3))
    grid.enter(torch.full((1, 3), 50.0))
    assert grid.inputs.learned.item() == pytest.approx(end)
    assert float(grid.record(torch.ones(2, 3))["input_scale"]) == pytest.approx(end / 7)


@pytest.mark.parametrize(
    ("fields", "why"),
    [({"activation_scale": "lsq"}, "activation_scale=lsq"), ({"activation_scale": "pact"}, "activation_scale=pact"),
     ({"scale": "lsq", "begin": 0.3}, "begin=0.3"), ({"scale": "lsq"}, None), ({"begin": 0.3}, None),
     ({"activation_scale": "observed", "begin": 0.3}, None)],
)  # fmt: skip
def test_an_average_along_the_fit_would_hold_what_stood_there_before(fields: dict[str, Any], why: str | None) -> None:
    settings = [f"compression.qat.{name}={value}" for name, value in fields.items()]
    for one in (["callbacks=ema"], ["callbacks=swa"], ["optimizer=schedule_free", "schedule=constant"]):
        asked = ["model=tiny-bert", "compression=quantize/qat", *settings, *one]
        if why is None:
            compose.build(compose.compose(asked).config)
            continue
        with pytest.raises(ConfigError, match=rf"^{one[0]} and quantize/qat with {why}: scales that learn .*; leave"):
            compose.build(compose.compose(asked).config)


KINDS = [
    {"activation_scale": "observed", "begin": 0.3, "freeze": 0.6}, {"activation_scale": "observed"},
    {"scale": "lsq"}, {"activation_scale": "lsq"}, {"scale": "lsq", "activation_scale": "pact", "bits": 4, "group": 8},
    {"begin": 0.3, "freeze": 0.6}, {"scale": "lsq", "activation_scale": "lsq", "begin": 0.3, "freeze": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize(("family", "task"), [("bert", "ner"), ("llama", "causal_lm")])
def test_what_is_stored_is_what_was_trained(
    setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str, fields: dict[str, Any]
) -> None:
    one = setting(family, task)
    context, stage = one.context(steps=4), QAT(**fields)
    effects = stage.prepare(one.model, context)
    assert effects.settled == (round(4 * fields["begin"]) + 1 if fields.get("begin") else 0)
    train(one.learner(effects=[effects]), [one.batch()] * 4, callbacks=effects.callbacks)
    trained = one.logits()
    for linear in context.targets.values():
        (grid,) = links(linear)
        assert isinstance(grid, TrainedGrid)
        assert grid.begun
        assert grid.frozen == ("freeze" in fields)
    context.records.update(fold(context.targets))
    (edit,) = stage.finalize(one.model, context)
    learned = fields.get("activation_scale", "token") != "token"
    assert sorted(edit.one_scale) == (sorted(context.targets) if learned else [])  # type: ignore[attr-defined]
    assert any(isinstance(module, IntegerLinear) for module in one.model.modules())
    off = (one.logits() - trained).abs().amax(-1) / trained.abs().max()
    assert float(off.median()) <= 1e-5
    assert float(off.max()) <= 0.03  # where a sum rounds an activation the other way


def test_before_its_beginning_the_fit_is_that_without_it(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    ends = []
    for stage in (QAT(begin=0.9), None):
        one = setting()
        effects = [stage.prepare(one.model, one.context(steps=10))] if stage else []
        train(one.learner(effects=effects), [one.batch()] * 3, callbacks=[c for e in effects for c in e.callbacks])
        ends.append(one.logits())
    assert torch.equal(*ends)


def test_it_begins_and_holds_at_its_steps(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    effects = QAT(begin=0.4, freeze=0.8).prepare(one.model, context := one.context(steps=5))
    grid: Any = links(next(iter(context.targets.values())))[0]
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append((grid.begun, grid.frozen))

    train(one.learner(effects=[effects]), [one.batch()] * 5, callbacks=[*effects.callbacks, Look()])
    assert seen == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)]  # steps 0 to 4; from 2 on, from 4 on


@pytest.mark.parametrize("scale", ["absmax", "lsq"])
def test_a_held_scale_moves_no_more(setting: Callable[..., Any], train: Callable[..., Any], scale: Any) -> None:
    one = setting()
    stage, context = QAT(scale=scale, activation_scale="lsq", freeze=0.3), one.context(steps=6)
    effects = stage.prepare(one.model, context)
    batches = [one.batch()] * 6
    seen = []

    class Look(type(effects.callbacks[0]).__mro__[1]):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            linear = next(iter(context.targets.values()))
            grid: Any = links(linear)[0]
            grouped = grid.layout.grouped(linear.parametrizations.weight.original.detach())
            seen.append((grid._scale(grouped).flatten().tolist(), grid.inputs.learned.item()))

    train(one.learner(effects=[effects]), batches, callbacks=[*effects.callbacks, Look()])
    assert seen[2] == seen[5]  # held after step 2
    assert seen[0] != seen[1]


def test_a_checkpoint_brings_the_state_back() -> None:
    weight = torch.randn(4, 16)
    one, other = (TrainedGrid(weight.shape, Layout(bits=4), "absmax", 8, "lsq", begun=False) for _ in range(2))
    one.begin(weight)
    one.train()
    one.enter(torch.randn(2, 16))
    one.hold(weight)
    other.load_state_dict(one.state_dict())
    assert (other.begun, other.frozen) == (True, True)
    assert other.inputs is not None
    assert other.inputs.drawn
    assert torch.equal(other(weight * 2), one(weight * 2))
    other.rest()
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_scales_of_a_linear_that_rests_rest_too() -> None:
    linear = nn.Linear(8, 4)
    linear.requires_grad_(False)
    grid = QAT(scale="lsq")._stack(linear, begun=True)
    assert not any(parameter.requires_grad for parameter in grid.parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"scale": "max"}, "scale='max': needs one of absmax, lsq"), ({"begin": 1.0}, "begin=1.0: needs a number"),
        ({"freeze": 0.2, "begin": 0.3}, "freeze=0.2: needs null or a number above"),
        ({"activation_bits": None, "activation_scale": "lsq"}, "activation_scale=lsq: has no effect with"),
        ({"pact_decay": -0.1}, "pact_decay=-0.1: needs a number of at least 0"),
        ({"activation_scale": "all"}, "activation_scale='all': needs one of token, observed, lsq, pact"),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.qat\.{said}"):
        QAT(**fields)


@pytest.mark.parametrize("field", ["begin", "freeze"])
def test_something_of_the_fit_comes_after_a_change(field: str) -> None:
    QAT(**{field: 0.9}).check_steps(40)
    with pytest.raises(ConfigError, match=rf"^compression\.qat\.{field}=0\.99: no step of a fit of 40 optimizer steps"):
        QAT(**{field: 0.99}).check_steps(40)


def test_a_step_comes_back_from_below_zero() -> None:
    """An optimizer may overshoot: a learned size is |step|, which has a gradient on both sides."""
    grid = TrainedGrid(torch.Size((1, 8)), Layout(bits=4), "lsq", None, "token", begun=True)
    with torch.no_grad():
        grid.step.fill_(-0.01)
    weight = torch.randn(1, 8)
    assert float(grid(weight).detach().abs().max()) == pytest.approx(0.07)
    grid(weight).square().sum().backward()
    assert grid.step.grad is not None
    assert float(grid.step.grad.abs()) > 0


def test_without_a_fit_there_is_nothing_to_learn() -> None:
    assert QAT().needs_fit() is None
    assert str(QAT(scale="lsq").needs_fit()).startswith("compression.qat.scale=lsq: needs a fit")


@pytest.mark.parametrize("fields", [{}, {"scale": "lsq"}])
def test_targets_alone_go_onto_the_grid(setting: Callable[..., Any], fields: dict[str, Any]) -> None:
    """So a group has to divide the inputs of those alone."""
    one = setting("llama", "causal_lm", overrides={"intermediate_size": 60})
    context = one.context()
    stage = QAT(bits=4, group=8, targets=["query", "feed_in"], **fields)
    stage.check(context.anatomy, context.targets)
    with pytest.raises(ConfigError, match=r"down_proj has 60 inputs, which it does not divide"):
        QAT(bits=4, group=8, **fields).check(context.anatomy, context.targets)
    stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    kinds = {name.rpartition(".")[2] for name, module in one.model.named_modules() if isinstance(module, IntegerLinear)}
    assert kinds == {"q_proj", "up_proj"}
