"""Optimizers: what is in them, and with how much decay; one step worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.optimizer import SGD, Adam, AdamW, groups
from niwaki.tuning.lora import LoRA


def test_matrices_decay_and_vectors_do_not(setting: Callable[..., Any]) -> None:
    model = setting().model
    decayed, plain = groups(model, 1.0, 0.3, {})
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    without = {names[id(p)] for p in plain["params"]}
    assert without == {n for n in names.values() if n.endswith("bias") or "LayerNorm" in n}
    assert {names[id(p)] for p in decayed["params"]} == set(names.values()) - without


def test_norms_without_bias_do_not_decay(setting: Callable[..., Any]) -> None:
    model = setting("llama", "causal_lm").model
    names = {id(p): n for n, p in model.named_parameters()}
    without = {names[id(p)] for p in groups(model, 1.0, 0.1, {})[1]["params"]}
    assert without == {n for n in names.values() if n.endswith("bias") or "norm" in n}


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD])
def test_only_what_learns_is_in_it_and_once(setting: Callable[..., Any], kind: type) -> None:
    one = setting()
    LoRA(rank=2).prepare(one.model, one.context())
    optimizer = kind().build(one.model)
    inside = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(inside) == sorted(id(p) for p in one.model.parameters() if p.requires_grad)
    assert 0 < len(inside) < len(list(one.model.parameters()))


def test_an_empty_group_is_left_out() -> None:
    assert len(groups(nn.Linear(2, 2, bias=False), 1.0, 0.1, {})) == 1


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
        *((kind, {"lr": value}) for kind in (AdamW, Adam, SGD) for value in (0.0, -1.0, NAN, INFINITY)),
        *((kind, {"weight_decay": value}) for kind in (AdamW, Adam, SGD) for value in (-1.0, NAN, INFINITY)),
        *((kind, {"eps": value}) for kind in (AdamW, Adam) for value in (0.0, -1e-8, NAN, INFINITY)),
        *(
            (kind, {"betas": value})
            for kind in (AdamW, Adam)
            for value in ((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9, 0.9, 0.9))
        ),
        *((SGD, {"momentum": value}) for value in (-0.1, 1.0, NAN, INFINITY)),
    ],
)
def test_refusals_name_the_field(kind: type, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.{next(iter(fields))}="):
        kind(**fields)


def test_the_ends_of_the_ranges() -> None:
    AdamW(betas=(0.0, 0.0), weight_decay=0.0)
    SGD(momentum=0.0)
