"""LoKr against its formula, for every way in which it keeps its two sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.tuning.delta import adapters
from niwaki.tuning.lokr import LoKr

FORMS = {  # of a (32, 32) linear: fields -> names of the parameters
    "square": ({"rank": 1}, {"w1", "w2_a", "w2_b"}),
    "full": ({"rank": 4}, {"w1", "w2"}),
    "factor": ({"rank": 2, "factor": 2}, {"w1", "w2_a", "w2_b"}),
    "both": ({"rank": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_formula_block_by_block(setting: Callable[..., Any], form: str) -> None:
    fields, names = FORMS[form]
    one = setting()
    tuning = LoKr(alpha=3.0, parts=["query"], **fields)  # type: ignore[arg-type]
    tuning.prepare(one.model, one.context())
    for _, found in adapters(one.model):
        layer: Any = found
        held = {n: getattr(layer, f"lokr_{n}") for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
        values = {name: one["default"] for name, one in held.items() if "default" in one}
        assert set(values) == names
        for value in values.values():
            value.data.normal_()
        first = values["w1"] if "w1" in names else values["w1_a"] @ values["w1_b"]
        second = values["w2"] if "w2" in names else values["w2_a"] @ values["w2_b"]
        weight = layer.get_base_layer().weight
        delta = tuning.merged(layer, weight) - weight
        height, width = second.shape
        assert first.shape[0] * height == first.shape[1] * width == 32
        for i in range(first.shape[0]):
            for j in range(first.shape[1]):
                block = delta[i * height : (i + 1) * height, j * width : (j + 1) * width]
                assert torch.allclose(block, 3.0 / tuning.rank * first[i, j] * second, atol=1e-5)
        assert torch.allclose(delta, layer.get_delta_weight("default"), atol=1e-5)
