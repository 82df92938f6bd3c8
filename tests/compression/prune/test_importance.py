"""Importance of heads and neurons, against the papers' formulas worked out in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.prune.importance import magnitude, measure
from niwaki.model.anatomy import Anatomy
from niwaki.model.units import units_of

FAMILIES = ("bert", "llama", "albert")


def enlarged(one: Any) -> Any:
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    one.model.double()
    return one


def test_magnitude_of_heads_and_neurons_by_hand(setting: Callable[..., Any]) -> None:
    one = enlarged(setting("bert"))
    block = one.model.bert.encoder.layer[1]
    own, rows = block.attention.self, slice(16, 24)  # head 2 of 4, of size 8
    owned = [t[rows].flatten() for part in (own.query, own.key, own.value) for t in (part.weight, part.bias)]
    head = torch.cat([*owned, block.attention.output.dense.weight[:, rows].flatten()])
    anatomy = Anatomy.of(one.model)
    assert float(magnitude(one.model, units_of(anatomy, "heads")[1])[2]) == pytest.approx(float(head.detach().norm()))
    entry, end = block.intermediate.dense, block.output.dense
    neuron = torch.cat([entry.weight[7], entry.bias[7:8], end.weight[:, 7]])
    assert float(magnitude(one.model, units_of(anatomy, "neurons")[1])[7]) == pytest.approx(
        float(neuron.detach().norm())
    )


def test_magnitude_of_a_fused_head(setting: Callable[..., Any]) -> None:
    one = enlarged(setting("gpt2"))
    fused, output = one.model.transformer.h[0].attn.c_attn, one.model.transformer.h[0].attn.c_proj
    owned = [t[s : s + 8].flatten() for s in (8, 40, 72) for t in (fused.weight, fused.bias)]
    head = torch.cat([*owned, output.weight[:, 8:16].flatten()])
    found = magnitude(one.model, units_of(Anatomy.of(one.model), "heads")[0])
    assert float(found[1]) == pytest.approx(float(head.detach().norm()))


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_mean_over_texts_of_the_change_of_their_loss(
    setting: Callable[..., Any], family: str, kind: Any
) -> None:
    """|L(xi = 1 + e) - L(xi = 1 - e)| / 2e for each text alone, with xi put into the weights that read the unit."""
    one = enlarged(setting(family))
    found = units_of(Anatomy.of(one.model), kind)
    scores = measure(one.model.eval(), found, "taylor", 8, one.context())
    step, unit, index = (1e-2 if family == "llama" else 1e-5), 1, len(found) - 1  # llama's norms are in fp32
    linear = one.model.get_submodule(found[index].output)
    columns = found[index].column_indices([unit])
    whole, changes = linear.weight.detach().clone(), []
    rows = one.rows
    for text in range(len(rows["text"])):
        batch = one.batch({name: values[text : text + 1] for name, values in rows.items()})
        losses = []
        for factor in (1 + step, 1 - step):
            with torch.no_grad():
                linear.weight.copy_(whole)
                linear.weight[:, columns] *= factor
                logits = one.model(**one.task.inputs(batch)).logits
                losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"]))
        changes.append(float((losses[0] - losses[1]).abs()) / (2 * step))
    assert float(scores[index][unit]) == pytest.approx(
        sum(changes) / len(changes), rel=1e-2 if family == "llama" else 1e-4
    )


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_activation_is_a_mean_over_text_without_padding(setting: Callable[..., Any], kind: Any) -> None:
    one = enlarged(setting("bert"))
    found = units_of(Anatomy.of(one.model), kind)[2]
    score = measure(one.model.eval(), [found], "activation", 8, one.context())[0]
    seen: list[torch.Tensor] = []
    handle = one.model.get_submodule(found.output).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    for text in range(len(one.rows["text"])):  # alone, so without padding
        one.model(**one.task.inputs(one.batch({k: v[text : text + 1] for k, v in one.rows.items()})))
    handle.remove()
    values = [abs(float(v)) for part in seen for token in part[0].detach() for v in token[found.column_indices([3])]]
    assert float(score[3]) == pytest.approx(sum(values) / len(values), rel=1e-9)


@pytest.mark.parametrize("kind", ["taylor", "activation"])
def test_measuring_leaves_no_trace(setting: Callable[..., Any], kind: Any) -> None:
    one = setting()
    one.model.train()
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    measure(one.model, units_of(Anatomy.of(one.model), "heads"), kind, 8, one.context())
    assert one.model.training
    assert not any(module._forward_pre_hooks for module in one.model.modules())
    assert all(parameter.grad is None for parameter in one.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.state_dict().items())
