"""BOFT: butterfly factors by hand, orthogonal, and dense where block rotations are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.tuning.boft import BOFT
from niwaki.tuning.delta import adapters
from niwaki.weights import links


def layer_of(one: Any, tuning: BOFT) -> Any:
    tuning.prepare(one.model, one.context())
    layer: Any = next(layer for _, layer in adapters(one.model))
    layer.boft_R["default"].data.normal_(std=0.7)
    return layer


def rotation_of(tuning: BOFT, layer: Any) -> Tensor:
    """R (in, in), as the merge applies it."""
    return tuning.merged(layer, torch.eye(32)).detach().T


def test_two_factors_by_hand(setting: Callable[..., Any]) -> None:
    tuning = BOFT(block=4, factors=2, parts=["query"])
    layer = layer_of(setting(), tuning)
    layer.boft_s["default"].data.normal_()
    blocks, weight = layer.boft_R["default"].detach(), layer.get_base_layer().weight
    skew = (blocks - blocks.transpose(2, 3)) / 2
    rotations = (torch.eye(4) - skew) @ torch.linalg.inv(torch.eye(4) + skew)
    near = torch.zeros(32, 32)  # the first factor: neighbours
    for block in range(8):
        near[4 * block : 4 * block + 4, 4 * block : 4 * block + 4] = rotations[0, block]
    far = torch.zeros(32, 32)  # the second: of each 8 inputs, pairs (0, 1), (4, 5) together, and (2, 3), (6, 7)
    for block in range(8):
        start = 8 * (block // 2) + 2 * (block % 2)
        members = torch.tensor([start, start + 1, start + 4, start + 5])
        far[members[:, None], members] = rotations[1, block]
    expected = layer.boft_s["default"] * (weight @ (far @ near).T)
    assert torch.allclose(tuning.merged(layer, weight), expected, atol=1e-5)


@pytest.mark.parametrize(("factors", "reach"), [(1, 4), (2, 8), (3, 16), (4, 32)])
def test_each_factor_doubles_the_reach_and_keeps_it_orthogonal(
    setting: Callable[..., Any], factors: int, reach: int
) -> None:
    tuning = BOFT(block=4, factors=factors, parts=["query"])
    rotation = rotation_of(tuning, layer_of(setting(), tuning))
    assert torch.allclose(rotation @ rotation.T, torch.eye(32), atol=1e-4)
    assert set((rotation.abs() > 1e-7).sum(1).tolist()) == {reach}


def test_the_scale_is_of_outputs(setting: Callable[..., Any]) -> None:
    tuning = BOFT(parts=["query"])
    one = setting()
    tuning.prepare(one.model, one.context())
    layer: Any = next(layer for _, layer in adapters(one.model))
    layer.boft_s["default"].data[3] = 2.0
    weight = layer.get_base_layer().parametrizations.weight.original
    expected = weight.clone()
    expected[3] *= 2
    assert torch.allclose(tuning.merged(layer, weight), expected, atol=1e-6)


def test_the_link_is_there_alone_too_and_no_kernel_is_compiled(
    setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "_FBD_CUDA", None)
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda **_: pytest.fail("a kernel was compiled"))
    one = setting()
    context = one.context()
    tuning = BOFT(factors=3)
    tuning.prepare(one.model, context)
    assert layer._FBD_CUDA is None
    assert all(len(links(linear)) == 1 for linear in context.targets.values())
    assert {tuple(found.boft_R["default"].shape[:1]) for _, found in adapters(one.model)} == {(3,)}  # type: ignore[index, union-attr]
    one.logits()
