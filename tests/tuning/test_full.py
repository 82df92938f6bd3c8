"""Full fine-tuning: everything learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from niwaki.tuning.full import Full


@pytest.mark.parametrize(("family", "task"), [("bert", "ner"), ("llama", "causal_lm")])
def test_every_parameter_learns(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    one.model.requires_grad_(False)
    effects = Full().prepare(one.model, one.context())
    assert all(p.requires_grad for p in one.model.parameters())
    assert (effects.callbacks, effects.terms, effects.settled) == ([], {}, 0)
    assert Full().finalize(one.model, one.context()) == []


def test_a_step_moves_everything_that_the_loss_depends_on(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one = setting("bert", "ner")
    Full().prepare(one.model, one.context())
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(), [one.batch()])
    still = {n for n, p in one.model.named_parameters() if bool((p == before[n]).all())}
    assert still == set()
