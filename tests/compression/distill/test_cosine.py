"""DistilBERT's cosine loss in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.distill.cosine import Cosine
from niwaki.model.teacher import Teacher


def cosine(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")])
@pytest.mark.parametrize("width", [32, 48])
def test_the_formula(pair: Callable[..., Any], family: str, task: str, width: int) -> None:
    both = pair(Cosine(teacher="x", weight=0.5), family, task, hidden_size=width)
    ours, theirs = (states[-1] for states in both.states())  # after the final norm
    if width == 48:
        ours = ours @ both.effects.modules["distill/cosine"].weight.T
    else:
        assert not both.effects.modules
    found = [
        1 - cosine(ours[row, position].tolist(), theirs[row, position].tolist())
        for row, length in enumerate(both.lengths())
        for position in range(length)
    ]
    assert both.loss().item() == pytest.approx(0.5 * sum(found) / len(found), rel=1e-4)


def test_only_the_direction_counts(setting: Callable[..., Any]) -> None:
    one, other = setting(), setting()
    norm = other.model.bert.encoder.layer[-1].output.LayerNorm
    norm.weight.data *= 3
    norm.bias.data *= 3
    effects = Cosine(teacher="x").prepare(one.model, one.context(load_teacher=lambda *_: Teacher(other.model)))
    (term,) = effects.terms.values()
    batch = one.batch()
    assert term(one.model.eval()(**one.task.inputs(batch)), batch).item() == pytest.approx(0.0, abs=1e-6)


def test_teachers_of_another_build(pair: Callable[..., Any]) -> None:
    """One stack of blocks, or two: what leaves the backbone can be compared."""
    both = pair(Cosine(teacher="x"), "bert", teacher="t5", d_model=48)
    loss = both.loss()
    loss.backward()
    assert bool(torch.isfinite(loss.detach()))
    assert 0 < loss.item() < 2
