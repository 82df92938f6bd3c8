"""Optimizers: what is in them, and with how much decay; one step worked by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from niwaki import compose
from niwaki.errors import ConfigError
from niwaki.optimizer import SGD, Adafactor, Adam, AdamW, AdamW8bit, Lion, ScheduleFree, groups
from niwaki.tuning.lora import LoRA

ADAMS = (AdamW, Adam, AdamW8bit, ScheduleFree)
KINDS = (AdamW, Adam, SGD, Adafactor, Lion, ScheduleFree)


def test_matrices_decay_and_vectors_do_not(setting: Callable[..., Any]) -> None:
    model = setting().model
    decayed, plain = groups(model, AdamW(lr=1.0).rates(model), 0.3, {})
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    without = {names[id(p)] for p in plain["params"]}
    assert without == {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n}
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - without


def test_norms_without_bias_do_not_decay(setting: Callable[..., Any]) -> None:
    model = setting("llama", "causal_lm").model
    names = {id(p): n for n, p in model.named_parameters()}
    without = {names[id(p)] for p in groups(model, AdamW(lr=1.0).rates(model), 0.1, {})[1]["params"]}
    assert without == {n for n in names.values() if n.endswith("bias") or "norm" in n}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_learns_is_in_it_and_once(setting: Callable[..., Any], kind: type) -> None:
    one = setting()
    LoRA(rank=2).prepare(one.model, one.context())
    optimizer = kind().build(one.model)
    inside = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(inside) == sorted(id(p) for p in one.model.parameters() if p.requires_grad)
    assert 0 < len(inside) < len(list(one.model.parameters()))


def test_an_empty_group_is_left_out() -> None:
    assert len(groups(nn.Linear(2, 2, bias=False), {"weight": 1.0}, 0.1, {})) == 1


def test_a_factor_multiplies_the_rate_of_what_it_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    optimizer = AdamW(lr=0.1, weight_decay=0.2).build(model, factors={"0.weight": 3.0, "0.bias": 3.0})
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert {n: rates[id(p)] for n, p in model.named_parameters()} == {
        "0.weight": (pytest.approx(0.3), 0.2), "0.bias": (pytest.approx(0.3), 0.0), "1.weight": (0.1, 0.2),
    }  # fmt: skip


def one_step(settings: Any) -> float:
    """The weight after one step from 2 with gradient 0.5."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = settings.build(model)
    model.weight.grad = torch.full((2, 2), 0.5)
    optimizer.step()
    return model.weight[0, 0].item()


def test_steps_worked_by_hand() -> None:
    # Adam's first step is lr * sign(gradient); decoupled decay takes lr * decay * weight besides.
    assert one_step(AdamW(lr=0.1, weight_decay=0.2)) == pytest.approx(2 - 0.1 * 0.2 * 2 - 0.1, abs=1e-6)
    assert one_step(Adam(lr=0.1)) == pytest.approx(2 - 0.1, abs=1e-6)
    assert one_step(SGD(lr=0.1)) == pytest.approx(2 - 0.1 * 0.5, abs=1e-6)
    assert one_step(SGD(lr=0.1, weight_decay=0.2)) == pytest.approx(2 - 0.1 * (0.5 + 0.2 * 2), abs=1e-6)


def test_momentum_worked_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = SGD(lr=0.1, momentum=0.9).build(model)
    for _ in range(2):
        model.weight.grad = torch.full((1, 1), 0.5)
        optimizer.step()
    assert model.weight.item() == pytest.approx(2 - 0.1 * 0.5 - 0.1 * (0.9 * 0.5 + 0.5), abs=1e-6)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *((kind, {"lr": value}) for kind in (*KINDS, AdamW8bit) for value in (0.0, -1.0, NAN, INFINITY)),
        *((kind, {"weight_decay": value}) for kind in (*KINDS, AdamW8bit) for value in (-1.0, NAN, INFINITY)),
        *(
            (kind, {"eps": value})
            for kind in (AdamW, Adam, AdamW8bit, ScheduleFree)
            for value in (0.0, -1e-8, NAN, INFINITY)
        ),
        *(
            (kind, {"betas": value})
            for kind in (*ADAMS, Lion)
            for value in ((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9, 0.9, 0.9))
        ),
        (ScheduleFree, {"betas": (0.0, 0.9)}),
        *((Adafactor, {"clip": value}) for value in (0.9, NAN, INFINITY)),
        *((Adafactor, {"second_moment_decay": value}) for value in (0.0, -1.1, NAN)),
        *((SGD, {"momentum": value}) for value in (-0.1, 1.0, NAN, INFINITY)),
    ],
)
def test_refusals_name_the_field(kind: type, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.{next(iter(fields))}="):
        kind(**fields)


def test_the_ends_of_the_ranges() -> None:
    AdamW(betas=(0.0, 0.0), weight_decay=0.0)
    SGD(momentum=0.0)


def test_adafactor_by_hand() -> None:
    # The first second moment is the gradient's own square: the direction is 1 everywhere, of RMS 1, which is not
    # clipped; the step is as large as the RMS of the weight, 2, times the rate.
    assert one_step(Adafactor(lr=0.1)) == pytest.approx(2 - 2 * 0.1, abs=1e-6)
    assert one_step(Adafactor(lr=0.1, weight_decay=0.2)) == pytest.approx(2 * (1 - 0.1 * 0.2) - 2 * 0.1, abs=0.005)


def test_adafactor_factors_the_second_moment_and_clips() -> None:
    model = nn.Linear(3, 2, bias=False)
    start = model.weight.detach().clone()
    gradient = torch.tensor([[1.0, 2.0, 0.5], [3.0, -4.0, 0.1]])
    optimizer = Adafactor(lr=0.01).build(model)
    model.weight.grad = gradient.clone()
    optimizer.step()
    square = gradient**2
    moment = square.sum(1, keepdim=True) @ square.sum(0, keepdim=True) / square.sum()  # algorithm 4 of the paper
    update = gradient / moment.sqrt()
    update = update / max(1.0, float(update.square().mean().sqrt()))
    size = max(1e-3, float(start.square().mean().sqrt()))
    assert torch.allclose(model.weight, start - 0.01 * size * update, atol=1e-6)
    state = optimizer.state[model.weight]
    assert sorted(t.numel() for t in state.values()) == [1, 2, 3]  # the step, rows and columns


@pytest.mark.parametrize("decay", [-0.8, -0.5])
def test_adafactors_second_moment_fades_as_it_is_told(decay: float) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = Adafactor(lr=0.1, second_moment_decay=decay).build(model)
    for gradient in (0.5, 0.25):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    old = 1 - 2**decay  # the share of the first square at the second step
    moment = old * 0.5**2 + (1 - old) * 0.25**2
    assert model.weight.item() == pytest.approx(1.8 - 1.8 * 0.1 * 0.25 / moment**0.5, abs=1e-5)


def test_lion_by_hand() -> None:
    assert one_step(Lion(lr=0.1, weight_decay=0.2)) == pytest.approx(2 * (1 - 0.1 * 0.2) - 0.1, abs=1e-6)
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = Lion(lr=0.1, weight_decay=0.0).build(model)
    # m = 0.01 * 0.5 = 0.005; then 0.9 * 0.005 - 0.1 * 0.04 > 0 goes on down against the gradient,
    # m = 0.99 * 0.005 - 0.01 * 0.04 = 0.00455; then 0.9 * 0.00455 - 0.1 * 0.05 < 0 turns
    for gradient, expected in ((0.5, 1.9), (-0.04, 1.8), (-0.05, 1.9)):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected, abs=1e-6)


def test_schedule_free_by_hand() -> None:
    """With a gradient that stays the normalised step is 1: z = 2 - 0.1 t, x the mean of the z, y between them."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = ScheduleFree(lr=0.1, weight_decay=0.0).build(model)
    for _ in range(3):
        model.weight.grad = torch.full((1, 1), 0.5)
        optimizer.step()
    z, x = 2 - 0.3, 2 - (0.1 + 0.2 + 0.3) / 3
    assert optimizer.state[model.weight]["z"].item() == pytest.approx(z, abs=1e-5)
    assert model.weight.item() == pytest.approx(0.1 * z + 0.9 * x, abs=1e-5)
    learner: Any = SimpleNamespace(model=model, trainer=SimpleNamespace(optimizers=[optimizer]))
    average = ScheduleFree().average()
    assert average is not None
    assert average.average(learner)["weight"].item() == pytest.approx(x, abs=1e-5)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's step as it is written: compiled on a CPU it would take minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.filterwarnings("ignore")  # of the import of torchao
def test_the_8_bit_moments_are_close_to_whole_ones_and_go_on_from_a_file(eager: None, tmp_path: Path) -> None:
    def started() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(64, 64)

    def advance(model: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    settings, models = {"lr": 0.01, "weight_decay": 0.1}, [started(), started(), started()]
    whole, small, resumed = AdamW(**settings), AdamW8bit(**settings), AdamW8bit(**settings)
    optimizers = [kind.build(model, fused=False) for kind, model in zip((whole, small, resumed), models, strict=True)]
    advance(models[0], optimizers[0], range(1))
    advance(models[1], optimizers[1], range(1))
    assert torch.allclose(models[1].weight, models[0].weight, atol=1e-6)  # its moments are rounded after the step
    assert optimizers[1].state[models[1].weight]["exp_avg"].codes.dtype == torch.uint8
    assert optimizers[1].state[models[1].bias]["exp_avg"].dtype == torch.float32  # below 4096 elements
    torch.save({"model": models[1].state_dict(), "optimizer": optimizers[1].state_dict()}, tmp_path / "state.pt")
    for model, optimizer in zip(models[:2], optimizers[:2], strict=True):
        advance(model, optimizer, range(1, 5))
    moved = (models[0].weight - started().weight).abs().mean()
    assert 0 < (models[1].weight - models[0].weight).abs().mean() < 0.1 * moved
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    models[2].load_state_dict(stored["model"])
    optimizers[2].load_state_dict(stored["optimizer"])
    advance(models[2], optimizers[2], range(1, 5))
    assert torch.equal(models[2].weight, models[1].weight)


def test_some_parameters_may_learn_later_than_others() -> None:
    """torch's fused SGD fails where only some have a momentum."""
    for kind in KINDS:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = kind(lr=0.1).build(model)
        for count in (2, 4):
            for parameter in list(model.parameters())[:count]:
                parameter.grad = torch.ones_like(parameter)
            before = model[1].weight.detach().clone()
            optimizer.step()
            assert torch.equal(model[1].weight, before) is (count == 2)


def composed(*overrides: str) -> Any:
    return compose.build(compose.compose(compose.parse(["model=tiny-bert", *overrides]).overrides).config)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer=adamw8bit and trainer\.accelerator='cpu': torchao compiles"):
        composed("optimizer=adamw8bit")
    composed("optimizer=adamw8bit", "trainer=gpu")
    for schedule in ("linear", "cosine", "swa"):
        with pytest.raises(ConfigError, match=rf"^optimizer=schedule_free and schedule={schedule}: its average"):
            composed("optimizer=schedule_free", f"schedule={schedule}")
    composed("optimizer=schedule_free", "schedule=constant", "schedule.warmup=0.2")


@pytest.mark.parametrize(
    ("kind", "package", "option"), [(Lion, "lion_pytorch", "lion"), (ScheduleFree, "schedulefree", "schedule_free")]
)
def test_a_package_that_is_missing_is_named(
    kind: type, package: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=rf"^optimizer={option}: needs a package; pip install 'niwaki\[optimizers\]'"):
        kind()


def test_rates_by_part_from_the_command_line() -> None:
    recipe = composed("optimizer.lr_by_part={head: 1e-3}", "optimizer.layer_decay=0.9")
    assert dict(recipe.optimizer.lr_by_part) == {"head": 1e-3}
    recipe = composed("optimizer.lr_by_part.head=1e-3", "optimizer.lr_by_part.norms=1e-4")
    assert dict(recipe.optimizer.lr_by_part) == {"head": 1e-3, "norms": 1e-4}
