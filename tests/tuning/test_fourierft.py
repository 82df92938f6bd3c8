"""FourierFT against its formula: a sum of waves, at places that the seed draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from niwaki.tuning.delta import adapters
from niwaki.tuning.fourierft import FourierFT


def places(one: Any, seed: int) -> list[torch.Tensor]:
    context = one.context()
    context.seed = seed
    FourierFT(frequencies=10).prepare(one.model, context)
    return [layer.indices["default"] for _, layer in adapters(one.model)]  # type: ignore[union-attr]


def test_the_formula_wave_by_wave(setting: Callable[..., Any]) -> None:
    one = setting()
    tuning = FourierFT(frequencies=5, scaling=20.0)
    tuning.prepare(one.model, one.context())
    for _, found in adapters(one.model):
        layer: Any = found
        coefficients, (rows, columns) = layer.fourierft_spectrum["default"], layer.indices["default"]
        coefficients.data.normal_()
        weight = layer.get_base_layer().weight
        out, inputs = weight.shape
        merged = tuning.merged(layer, weight)
        for p, q in ((0, 0), (3, 17), (31, 30)):
            waves = [
                float(c) * math.cos(2 * math.pi * (p * int(j) / out + q * int(k) / inputs)) / (out * inputs)
                for c, j, k in zip(coefficients.detach(), rows, columns, strict=True)
            ]
            assert math.isclose(float(merged[p, q].detach()), float(weight[p, q]) + 20 * sum(waves), abs_tol=1e-6)


def test_places_are_the_seed_s(setting: Callable[..., Any]) -> None:
    first, again, other = places(setting(), 0), places(setting(), 0), places(setting(), 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_zero_starts_as_the_model_itself_and_normal_does_not(setting: Callable[..., Any]) -> None:
    before = setting().logits()
    for init in ("zero", "normal"):
        one = setting()
        FourierFT(frequencies=100, init=init).prepare(one.model, one.context())  # type: ignore[arg-type]
        assert torch.equal(one.logits(), before) is (init == "zero")
