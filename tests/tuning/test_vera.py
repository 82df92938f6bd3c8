"""VeRA against its formula, with one pair of random matrices for all linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.tuning.delta import adapters
from niwaki.tuning.vera import VeRA


def test_the_formula_with_slices_of_one_pair(setting: Callable[..., Any]) -> None:
    one = setting()
    tuning = VeRA(rank=6, start=0.2)
    tuning.prepare(one.model, one.context())
    pairs = set()
    for _, layer in adapters(one.model):
        d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]  # type: ignore[index, union-attr]
        assert torch.equal(d, torch.full((6,), 0.2))
        assert torch.equal(b, torch.zeros(layer.get_base_layer().out_features))
        d.data.normal_()
        b.data.normal_()
        whole_a, whole_b = layer.vera_A["default"], layer.vera_B["default"]  # type: ignore[index, union-attr]
        assert (tuple(whole_a.shape), tuple(whole_b.shape)) == ((6, 64), (64, 6))
        pairs.add((whole_a.data_ptr(), whole_b.data_ptr()))
        weight = layer.get_base_layer().weight
        out, inputs = weight.shape
        delta = torch.diag(b) @ whole_b[:out] @ torch.diag(d) @ whole_a[:, :inputs]
        assert torch.allclose(tuning.merged(layer, weight), weight + delta, atol=1e-5)
    assert len(pairs) == 1


def test_the_matrices_are_the_seed_s_and_in_the_checkpoint(setting: Callable[..., Any]) -> None:
    def drawn(seed: int) -> torch.Tensor:
        one = setting()
        context = one.context()
        context.seed = seed
        VeRA(rank=4).prepare(one.model, context)
        (matrix,) = {m.data_ptr(): m for n, m in one.model.state_dict().items() if ".vera_A." in n}.values()
        return matrix

    torch.manual_seed(1)
    first = drawn(7)
    torch.manual_seed(2)
    assert torch.equal(drawn(7), first)
    assert not torch.equal(drawn(8), first)


@pytest.mark.parametrize("rank", [1, 300])
def test_what_learns_is_one_number_per_output_and_per_rank(setting: Callable[..., Any], rank: int) -> None:
    one = setting("llama", "causal_lm")
    context = one.context()
    VeRA(rank=rank).prepare(one.model, context)
    outputs = sum(linear.out_features for linear in context.targets.values())
    assert sum(p.numel() for p in one.model.parameters() if p.requires_grad) == outputs + rank * len(context.targets)
