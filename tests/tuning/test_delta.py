"""PEFT's adapters as a link: the same function as PEFT's own forward, merged once and only once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from niwaki.tuning.delta import Delta, adapters, inject, link, unload
from niwaki.weights import entering, fold, links

TARGETS = ["query", "value", "intermediate.dense"]


def adapted(one: Any) -> Any:
    context = one.context()
    inject(one.model, LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS))
    for name, parameter in one.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return context


def test_the_link_is_what_peft_computes_beside(setting: Callable[..., Any]) -> None:
    one = setting()
    context = adapted(one)
    beside = one.logits()
    link(one.model, context.targets)
    assert torch.allclose(one.logits(), beside, atol=1e-6)
    layer = next(layer for _, layer in adapters(one.model))
    base = layer.get_base_layer()
    (delta,) = links(base)
    assert isinstance(delta, Delta)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index, union-attr]
    assert torch.allclose(base.weight - entering(base, delta), 2.0 * b @ a, atol=1e-6)


def test_only_adapted_targets_get_a_link_and_only_one(setting: Callable[..., Any]) -> None:
    one = setting()
    context = adapted(one)
    link(one.model, context.targets)
    link(one.model, context.targets)
    linked = {name for name, linear in context.targets.items() if links(linear)}
    assert linked == {n for n in context.targets if n.endswith(("query", "value", "intermediate.dense"))}
    assert all(len(links(linear)) <= 1 for linear in context.targets.values())


def test_the_link_makes_no_cycle_and_no_second_parameter(setting: Callable[..., Any]) -> None:
    one = setting()
    context = adapted(one)
    count = len(list(one.model.parameters()))
    link(one.model, context.targets)
    assert len(list(one.model.parameters())) == count
    found = [delta for linear in context.targets.values() for delta in links(linear)]
    assert found
    assert all(not list(delta.parameters()) for delta in found)


@pytest.mark.parametrize("chained", ["none", "all", "some"])
def test_unload_merges_what_is_not_in_its_weight_yet(setting: Callable[..., Any], chained: str) -> None:
    one = setting()
    context = adapted(one)
    names = list(context.targets)
    targets = {n: context.targets[n] for n in {"none": [], "all": names, "some": names[:5]}[chained]}
    link(one.model, targets)
    trained = one.logits()
    fold(targets)
    unload(one.model)
    assert torch.allclose(one.logits(), trained, atol=1e-6)
    assert list(adapters(one.model)) == []
    assert set(one.model.state_dict()) == set(setting().model.state_dict())
    assert not any("lora" in name for name, _ in one.model.named_modules())


def test_inject_freezes_all_but_the_adapters_without_a_warning(setting: Callable[..., Any]) -> None:
    one = setting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(one)
    assert {n for n, p in one.model.named_parameters() if p.requires_grad} == {
        n for n, _ in one.model.named_parameters() if ".lora_A." in n or ".lora_B." in n
    }
