"""(IA)^3 by hand: rows and biases of keys and values, columns of what ends the feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from niwaki.optimizer import AdamW
from niwaki.tuning.boft import BOFT
from niwaki.tuning.delta import adapters
from niwaki.tuning.ia3 import IA3
from niwaki.weights import fold

NAMES = {"bert": ("attention.self.key", "attention.self.value", "output.dense"),
         "llama": ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")}  # fmt: skip


def with_biases(one: Any) -> Any:
    """Biases that are not zero, as those of a random model are."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in one.model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return one


def scaled(one: Any, tuning: IA3) -> dict[str, torch.Tensor]:
    """Draw every vector; by the name of the linear."""
    vectors = {}
    for name, layer in adapters(one.model):
        vector = layer.ia3_l["default"]  # type: ignore[index, union-attr]
        vector.data = 1 + 0.5 * torch.randn(vector.shape)
        vectors[name] = vector.data.flatten()
    return vectors


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_formula(setting: Callable[..., Any], family: str, chained: bool) -> None:
    one, dense, base = (with_biases(setting(family)) for _ in range(3))
    tuning, context = IA3(), one.context()
    blocks = [place for place, _, _ in context.anatomy.named_blocks()]
    tuning.prepare(one.model, context)
    vectors = scaled(one, tuning)
    assert set(vectors) == {f"{place}.{name}" for place in blocks for name in NAMES[family]}
    for name, vector in vectors.items():
        linear: Any = dense.model.get_submodule(name)
        if name.endswith(NAMES[family][2]):
            linear.weight.data *= vector  # columns: the input is scaled
        else:
            linear.weight.data *= vector[:, None]
            linear.bias.data *= vector
    if chained:
        tuning.link(one.model, context)
    assert float((base.logits() - dense.logits()).abs().max()) > 5e-5
    assert float((one.logits() - dense.logits()).abs().max()) <= 1e-6
    fold(context.targets)
    tuning.finalize(one.model, context)
    state = one.model.state_dict()
    assert all(torch.allclose(tensor, state[name], atol=1e-6) for name, tensor in dense.model.state_dict().items())
    assert not any(parametrize.is_parametrized(module) for module in one.model.modules())


def test_another_part_is_scaled_at_its_output(setting: Callable[..., Any]) -> None:
    one = setting()
    IA3(parts=["query", "feed_in"]).prepare(one.model, one.context())
    shapes = {name: tuple(layer.ia3_l["default"].shape) for name, layer in adapters(one.model)}  # type: ignore[index, union-attr]
    assert shapes["bert.encoder.layer.0.attention.self.query"] == (32, 1)
    assert shapes["bert.encoder.layer.0.intermediate.dense"] == (64, 1)


def test_the_bias_is_scaled_through_the_chain_too(setting: Callable[..., Any]) -> None:
    one = setting()
    tuning, context = IA3(), one.context()
    tuning.prepare(one.model, context)
    tuning.link(one.model, context)
    tuning.link(one.model, context)
    layer = one.model.bert.encoder.layer[0]
    assert parametrize.is_parametrized(layer.attention.self.key.base_layer, "bias")
    assert len(layer.attention.self.key.base_layer.parametrizations.bias) == 1
    assert not parametrize.is_parametrized(layer.output.dense.base_layer, "bias")
    one.logits()
    one.model.train()
    one.model(**one.task.inputs(one.batch())).logits.sum().backward()
    assert all(
        isinstance(p, nn.Parameter) and p.grad is not None for n, p in one.model.named_parameters() if "ia3" in n
    )


def test_a_model_without_biases(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm", overrides={"attention_bias": False, "mlp_bias": False})
    tuning, context = IA3(), one.context()
    tuning.prepare(one.model, context)
    scaled(one, tuning)
    beside = one.logits()
    tuning.link(one.model, context)
    assert float((one.logits() - beside).abs().max()) <= 1e-6


def test_vectors_that_start_at_one_do_not_decay(setting: Callable[..., Any]) -> None:
    for tuning, kind in ((IA3(), ".ia3_l."), (BOFT(), ".boft_s.")):
        one = setting()
        tuning.prepare(one.model, one.context())
        groups = AdamW(weight_decay=0.1).build(one.model).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert {decay[id(p)] for n, p in one.model.named_parameters() if kind in n} == {0.0}
        assert decay[id(one.model.classifier.weight)] == 0.1
