"""LoRA against its formula, against a model built by hand with PEFT, and by the names of what learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ConfigError
from niwaki.model.anatomy import PARTS
from niwaki.optimizer import SGD
from niwaki.stage import refuse_conflicts
from niwaki.tuning.lora import LoRA
from niwaki.weights import fold

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "classification"), ("llama", "causal_lm")]


def draw(model: nn.Module) -> None:
    """Factors B that are not zero, the same for every model with the same names."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def inside(anatomy: Any, parts: Sequence[str] = PARTS) -> dict[str, nn.Linear]:
    """The linears of those parts."""
    return {name: anatomy.model.get_submodule(name) for name in anatomy.part_names(parts)}


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize(
    "parts", [PARTS, ["query", "value"], *([part] for part in PARTS if part != "feed_gate")], ids="-".join
)
def test_what_learns_and_how_many(setting: Callable[..., Any], family: str, task: str, parts: Sequence[str]) -> None:
    one = setting(family, task)
    context = one.context()
    shapes = {name: linear.weight.shape for name, linear in inside(context.anatomy, parts).items()}
    head = {id(p): p for p in context.anatomy.head_parameters().values()} if context.head_learns else {}
    LoRA(rank=3, parts=parts).prepare(one.model, context)
    learning = {n: p for n, p in one.model.named_parameters() if p.requires_grad}
    assert {n for n in learning if "lora_" in n} == {
        f"{name}.lora_{factor}.default.weight" for name in shapes for factor in "AB"
    }
    assert {id(p) for n, p in learning.items() if "lora_" not in n} == set(head)
    expected = sum(3 * (out + inputs) for out, inputs in shapes.values())
    assert sum(p.numel() for p in learning.values()) == expected + sum(p.numel() for p in head.values())


def test_only_adapters_and_head_move(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    head = {id(p) for p in context.anatomy.head_parameters().values()}
    LoRA(rank=2).prepare(one.model, context)
    draw(one.model)
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(), [one.batch()] * 2)
    moved = {n for n, p in one.model.named_parameters() if bool((p != before[n]).any())}
    assert moved == {n for n, p in one.model.named_parameters() if "lora_" in n or id(p) in head}


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_it_starts_as_the_model_itself(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    before = one.logits()
    LoRA().prepare(one.model, one.context())
    assert torch.equal(one.logits(), before)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_formula(setting: Callable[..., Any], family: str, task: str, stabilized: bool) -> None:
    one, dense = setting(family, task), setting(family, task)
    LoRA(rank=4, alpha=6.0, rank_stabilized=stabilized).prepare(one.model, one.context())
    draw(one.model)
    state = one.model.state_dict()
    scale = 6.0 / (math.sqrt(4) if stabilized else 4)
    for name in dense.context().targets:
        a, b = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
        dense.model.get_submodule(name).weight.data += scale * b @ a
    assert not torch.allclose(one.logits(), setting(family, task).logits(), atol=1e-3)
    assert torch.allclose(one.logits(), dense.logits(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_it_equals_peft_by_hand_before_and_after_the_merge(setting: Callable[..., Any], family: str, task: str) -> None:
    from peft import LoraConfig, get_peft_model

    one, other = setting(family, task), setting(family, task)
    tuning = LoRA(rank=4, alpha=8.0, parts=("query", "feed_out"))
    context = one.context()
    names = list(inside(context.anatomy, tuning.parts))
    tuning.prepare(one.model, context)
    draw(one.model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[*names])
    reference = get_peft_model(other.model, config)
    draw(reference.base_model.model)
    assert float((one.logits() - other.logits(reference)).abs().max()) <= 1e-6
    assert tuning.finalize(one.model, context) == []
    assert float((one.logits() - other.logits(reference)).abs().max()) <= 1e-6
    assert set(one.model.state_dict()) == set(setting(family, task).model.state_dict())
    assert not hasattr(one.model, "peft_config")


def test_dropout_of_the_input_while_training(setting: Callable[..., Any]) -> None:
    one = setting()
    LoRA(dropout=0.5).prepare(one.model, one.context())
    draw(one.model)
    inputs = one.task.inputs(one.batch())
    one.model.train()
    first, second = one.model(**inputs).logits, one.model(**inputs).logits
    assert not torch.equal(first, second)
    assert torch.equal(one.logits(), one.logits())


@pytest.mark.parametrize("weight", [Magnitude(), QAT()], ids=lambda stage: stage.name)
def test_dropout_and_a_weight_method_are_refused_by_both_names(weight: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_conflicts([LoRA(dropout=0.1), weight])
    assert f"tuning=lora with tuning.dropout=0.1 and {weight.name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dropout_and_a_method_after_the_fit_go_together() -> None:
    refuse_conflicts([LoRA(dropout=0.1), Int8()])
    refuse_conflicts([LoRA(), Magnitude(), QAT()])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout"),
        ({"parts": ["querry"]}, "parts"), ({"parts": []}, "parts"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tuning\.{name}="):
        LoRA(**fields)


def test_parts_that_this_family_lacks(setting: Callable[..., Any]) -> None:
    context = setting().context()
    with pytest.raises(ConfigError, match=r"^tuning\.parts=\['feed_gate'\]"):
        LoRA(parts=["feed_gate"]).check(context.anatomy, context.targets)
    LoRA().check(context.anatomy, context.targets)


def test_a_copy_of_a_merged_model_is_a_plain_model(setting: Callable[..., Any]) -> None:
    one = setting()
    context, tuning = one.context(), LoRA(rank=2)
    tuning.prepare(one.model, context)
    draw(one.model)
    tuning.finalize(one.model, context)
    assert torch.equal(one.logits(copy.deepcopy(one.model)), one.logits())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_a_start_from_the_weight_itself(setting: Callable[..., Any], family: str, task: str, init: Any) -> None:
    one, base = setting(family, task), setting(family, task)
    tuning = LoRA(rank=5, alpha=3.0, init=init)
    before = one.logits()
    context = one.context()
    tuning.prepare(one.model, context)
    assert float((one.logits() - before).abs().max()) <= 1e-6
    state = one.model.state_dict()
    for name, linear in base.context().targets.items():
        a, b = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
        kept = state[f"{name}.base_layer.weight"]
        assert torch.allclose(kept + 3 / 5 * b @ a, linear.weight, atol=1e-6)
        if init == "pissa":  # the largest singular values are in the adapter
            values = torch.linalg.svdvals(linear.weight.detach())
            assert torch.allclose(torch.linalg.svdvals(3 / 5 * b @ a)[:5], values[:5], atol=1e-5)
            assert torch.allclose(torch.linalg.svdvals(kept)[:-5], values[5:], atol=1e-5)
        else:
            assert torch.allclose(b.T @ b, torch.eye(5), atol=1e-5)
    tuning.link(one.model, context)
    assert float((one.logits() - before).abs().max()) <= 1e-6
    linked = one.logits()
    fold(context.targets)
    tuning.finalize(one.model, context)
    assert torch.equal(one.logits(), linked)


@pytest.mark.parametrize("linked", [False, True])
def test_b_learns_faster_than_a(setting: Callable[..., Any], linked: bool) -> None:
    one = setting()
    context, tuning = one.context(), LoRA(rank=2, lr_ratio=16.0)
    effects = tuning.prepare(one.model, context)
    if linked:
        tuning.link(one.model, context)
    named = dict(one.model.named_parameters())
    assert set(effects.lr_factors) == {n for n in named if ".lora_B." in n}
    settings = SGD(lr=0.25, momentum=0.0)
    rates = {
        id(p): group["lr"]
        for group in settings.build(one.model, factors=effects.lr_factors).param_groups
        for p in group["params"]
    }
    assert {n: rates[id(p)] for n, p in named.items() if p.requires_grad} == {
        n: 4.0 if ".lora_B." in n else 0.25 for n, p in named.items() if p.requires_grad
    }
    assert LoRA().prepare((other := setting()).model, other.context()).lr_factors == {}
