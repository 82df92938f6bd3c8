"""Sizes: tied weights once, zeros of masks and of integers, bits of targets, multiply-adds by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.qat import QAT
from niwaki.measure.size import count, held_bytes, macs, peak_memory_mb, target_table
from niwaki.weights import fold


def integers(one: Any, **settings: Any) -> Any:
    context = one.context()
    Magnitude(pattern="2:4").prepare(one.model, context)
    stage = QAT(**settings)
    stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    return context


def test_by_hand() -> None:
    linear = nn.Linear(3, 2)
    linear.weight.data = torch.tensor([[1.0, 0.0, -0.0], [2.0, 0.0, 3.0]])
    linear.bias.data = torch.tensor([0.0, 1.0])
    assert count(linear) == {"parameters": 8, "nonzero": 4}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_tied_weights_count_once(setting: Callable[..., Any], family: str) -> None:
    model = setting(family, "causal_lm").model
    assert count(model)["parameters"] == sum(p.numel() for p in model.parameters())
    model.get_input_embeddings().weight.data.zero_()
    rest = sum(int(p.count_nonzero()) for p in model.parameters())
    assert count(model)["nonzero"] == rest


@pytest.mark.parametrize("bits", [3, 8])
def test_integers_count_as_the_weights_that_they_are(setting: Callable[..., Any], bits: int) -> None:
    one = setting()
    before = count(one.model)
    context = integers(one, bits=bits, group=8)
    after = count(one.model)
    zeros = sum(int((r["codes"] == 0).sum()) for r in context.records.values())
    weights = sum(linear.weight.numel() for linear in context.targets.values())
    assert after["parameters"] == before["parameters"]
    assert after["nonzero"] == before["nonzero"] - zeros
    assert zeros >= weights // 2


def test_the_table_of_targets(setting: Callable[..., Any]) -> None:
    one = setting()
    names = list(one.context().targets)
    assert target_table(one.model, names[:1]) == {names[0]: {"parameters": 1024, "sparsity": 0.0, "bits": 32}}
    context = integers(one, bits=4)
    for name, row in target_table(one.model, names).items():
        codes = context.records[name]["codes"]
        assert row == {
            "parameters": codes.numel(),
            "sparsity": pytest.approx(float((codes == 0).float().mean())),
            "bits": 4,
        }


@pytest.mark.parametrize("length", [5, 9])
def test_multiply_adds_by_hand(setting: Callable[..., Any], length: int) -> None:
    one = setting()
    inputs = {"input_ids": torch.randint(5, 20, (2, length)), "attention_mask": torch.ones(2, length).long()}
    width, feed = 32, 64
    block = 2 * length * (4 * width * width + 2 * width * feed) + 2 * 2 * length * length * width
    expected = 3 * block + 2 * (width * width + width * 3)  # pooler and head see one token of each row
    assert macs(one.model, inputs) == expected
    integers(one, bits=8)
    assert macs(one.model, inputs) == expected


def test_peak_memory_only_rises() -> None:
    first = peak_memory_mb()
    assert first > 50
    held = torch.ones(40_000_000)
    assert peak_memory_mb() >= first
    assert held.sum() > 0


def test_a_linear_below_an_adapter_is_the_target(setting: Callable[..., Any]) -> None:
    from niwaki.tuning.qlora import QLoRA

    one = setting()
    context = one.context()
    QLoRA(rank=2).prepare(one.model, context)
    table = target_table(one.model, list(context.targets))
    assert {row["bits"] for row in table.values()} == {4}
    assert sum(row["parameters"] for row in table.values()) == 3 * (4 * 32 * 32 + 2 * 32 * 64)
    for name, layer in context.targets.items():
        weight = layer.dequantized()  # type: ignore[operator]
        assert table[name]["sparsity"] == 1 - int(weight.count_nonzero()) / weight.numel()


def test_bytes_held_in_memory_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    model.append(nn.Linear(3, 2, bias=False))
    model[3].weight = model[0].weight  # tied: once
    # 8 + 6 + 6 fp32 parameters, 6 fp32 statistics, one 8-byte counter
    assert held_bytes(model) == (8 + 6 + 6 + 6) * 4 + 8
