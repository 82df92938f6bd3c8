"""One scale for all activations: the three ranges by hand, and a sample that stays small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from niwaki.compression.quantize import int8_static
from niwaki.compression.quantize.int8_static import Int8Static, Sample
from niwaki.errors import ConfigError
from niwaki.weights import links

VALUES = torch.cat([torch.linspace(-1, 1, 1999), torch.tensor([50.0])])


def bound(**fields: Any) -> float:
    stage = Int8Static(**fields)
    return float(stage.bound(stage.statistic(VALUES[:700]) + stage.statistic(VALUES[700:])))


def test_the_ranges_by_hand() -> None:
    assert bound(range="min_max") == 50.0
    ordered = sorted(map(abs, VALUES.tolist()))
    assert bound(range="percentile", percentile=99.0) == pytest.approx(ordered[1979])  # 99% of 2,000: the 1,980th
    assert bound(range="percentile", percentile=100.0) == 50.0
    tried = []
    for step in range(1, 101):
        scale = 50.0 * step / 100 / 127
        codes = [max(-127, min(127, round(abs(value) / scale))) for value in VALUES.tolist()]
        tried.append((sum((code * scale - abs(v)) ** 2 for code, v in zip(codes, VALUES.tolist(), strict=True)), step))
    assert bound(range="mse") == pytest.approx(50.0 * min(tried)[1] / 100, rel=1e-5)


def test_the_last_code_is_for_the_bound() -> None:
    linear = nn.Linear(8, 3)
    weight, values = linear.weight.detach().clone(), torch.randn(40, 8)
    stage = Int8Static(range="min_max")
    stage.quantize({"it": linear}, stage.statistic(values), None)  # type: ignore[arg-type]
    grid: Any = links(linear)[-1]
    assert float(grid.input_scale) == pytest.approx(float(values.abs().max()) / 127)
    rounded = (values / grid.input_scale).round() * grid.input_scale
    expected = functional.linear(rounded, grid(weight), linear.bias)
    torch.testing.assert_close(linear(values), expected)
    torch.testing.assert_close(linear(values * 3), functional.linear((3 * values / grid.input_scale).round().clamp(
        -127, 127) * grid.input_scale, grid(weight), linear.bias))  # fmt: skip


def test_a_sample_stays_small_and_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the tokens and over the channels, each of which has a size of its own here."""
    monkeypatch.setattr(int8_static, "KEPT", 2000)
    size = torch.arange(1.0, 65.0)
    stage, whole = Int8Static(range="percentile"), (size * torch.linspace(0.5, 1, 4096)[:, None])
    found = stage.statistic(whole[:512])
    for start in range(512, 4096, 512):
        found = found + stage.statistic(whole[start : start + 512])
    assert isinstance(found, Sample)
    assert 1990 <= len(found.values) <= 2000
    assert not len(Int8Static().statistic(whole).values)  # the largest is all that min_max asks for
    assert float(found.largest) == float(whole.max())
    expected = torch.tensor([0.1, 0.5, 0.9, 0.99])
    torch.testing.assert_close(found.values.quantile(expected), whole.flatten().quantile(expected), rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"range": "max"}, "range='max'"), ({"percentile": 30.0}, "percentile=30.0"), ({"rows": 0}, "rows=0")],
)
def test_refusals(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.int8_static\.{said}: needs"):
        Int8Static(**fields)
