"""Linear probing: exactly the head learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from niwaki.tuning.head import Head

HEADS = {
    ("bert", "classification"): {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    },
    ("bert", "ner"): {"classifier.weight", "classifier.bias"},
    ("llama", "classification"): {"score.weight"},
    ("llama", "ner"): {"score.weight", "score.bias"},
    ("llama", "causal_lm"): {"model.embed_tokens.weight"},  # tied to the output layer
}  # fmt: skip


@pytest.mark.parametrize(("family", "task"), HEADS)
def test_what_learns(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    Head().prepare(one.model, one.context())
    assert {n for n, p in one.model.named_parameters() if p.requires_grad} == HEADS[family, task]


def test_a_step_moves_the_head_and_nothing_else(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    Head().prepare(one.model, one.context())
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(), [one.batch()])
    moved = {n for n, p in one.model.named_parameters() if bool((p != before[n]).any())}
    assert moved == HEADS["bert", "classification"]
