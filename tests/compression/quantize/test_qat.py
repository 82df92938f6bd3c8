"""Quantization-aware training: the fit runs through the grid, and what is stored is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification
from niwaki.weights import fold

LAYOUTS = [
    {"bits": 8}, {"bits": 4, "group": 8}, {"bits": 2, "activation_bits": None},
    {"bits": 3, "group": 16, "activation_bits": 4},
]  # fmt: skip


@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
@pytest.mark.parametrize(("family", "task"), [("bert", "ner"), ("llama", "causal_lm")])
def test_what_is_stored_is_what_was_trained(
    setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str, fields: dict[str, Any]
) -> None:
    one = setting(family, task)
    context, stage = one.context(), QAT(**fields)
    stage.prepare(one.model, context)
    before = one.logits()
    train(one.learner(), [one.batch()] * 3)
    trained = one.logits()
    assert not torch.allclose(trained, before, atol=1e-4)
    folded = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    context.records.update(fold(context.targets))
    assert torch.equal(one.logits(), trained)
    (edit,) = stage.finalize(one.model, context)
    assert (edit.bits, edit.group, edit.activation_bits) == (stage.bits, stage.group, stage.activation_bits)  # type: ignore[attr-defined]
    integers = {n: m for n, m in one.model.named_modules() if isinstance(m, IntegerLinear)}
    assert list(integers) == list(context.targets) or set(integers) == set(context.targets)
    assert all(torch.equal(module.dequantized(), folded[name]) for name, module in integers.items())
    assert torch.allclose(one.logits(), trained, atol=1e-5)


def test_gradients_are_those_at_the_rounded_weight(setting: Callable[..., Any]) -> None:
    one, dense = setting(), setting()
    context = one.context()
    QAT(bits=4, activation_bits=None).prepare(one.model, context)
    for name, linear in context.targets.items():
        dense.model.get_submodule(name).weight.data = linear.weight.detach().clone()
    for each in (one, dense):
        each.task.loss(each.model(**each.task.inputs(each.batch())), each.batch()).backward()
    for name, linear in context.targets.items():
        expected = dense.model.get_submodule(name).weight.grad
        assert torch.allclose(linear.parametrizations.weight.original.grad, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"group": 1}, "group"), ({"group": 0}, "group"),
        ({"activation_bits": 1}, "activation_bits"), ({"activation_bits": 16}, "activation_bits"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.qat\.{name}="):
        QAT(**fields)


def test_a_group_that_does_not_fit_is_refused_on_the_empty_model() -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=r"compression\.qat\.group=24: bert\.\S+ has 32 inputs"):
        QAT(group=24).check(anatomy, anatomy.linears())
    QAT(group=16).check(anatomy, anatomy.linears())
