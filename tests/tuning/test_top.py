"""Partial fine-tuning: exactly the top blocks and what stands above them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification
from niwaki.tuning.top import Top

ABOVE = {
    ("bert", "classification"): ("classifier.", "bert.pooler."),
    ("llama", "classification"): ("score.", "model.norm."),
    ("llama", "causal_lm"): ("model.norm.",),
}


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize(("family", "task"), ABOVE)
def test_what_learns(setting: Callable[..., Any], family: str, task: str, blocks: int) -> None:
    one = setting(family, task)
    Top(blocks=blocks).prepare(one.model, one.context())
    place = "bert.encoder.layer" if family == "bert" else "model.layers"
    wanted = (*ABOVE[family, task], *(f"{place}.{i}." for i in range(3 - blocks, 3)))
    learning = {n for n, p in one.model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in one.model.named_parameters() if n.startswith(wanted)}


def test_a_step_moves_that_and_nothing_else(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    Top(blocks=1).prepare(one.model, one.context())
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(), [one.batch()])
    moved = {n for n, p in one.model.named_parameters() if bool((p != before[n]).any())}
    assert moved == {n for n in before if n.startswith(("classifier.", "bert.pooler.", "bert.encoder.layer.2."))}


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"^tuning\.blocks=0: needs"):
        Top(blocks=0)
    anatomy = Anatomy.of(Tiny(layers=[0, 2]).empty(Classification(), ("a", "b")))
    Top(blocks=2).check(anatomy, {})
    with pytest.raises(ConfigError, match=r"^tuning\.blocks=3: this model has 2; needs at most as many$"):
        Top(blocks=3).check(anatomy, {})
