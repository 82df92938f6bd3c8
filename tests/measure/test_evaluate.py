"""Evaluation: the whole split, in eval mode, in full precision; and the largest difference of two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.measure.evaluate import evaluate, largest_difference


def test_scores_do_not_depend_on_the_batches(setting: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    features = one.features()
    whole = evaluate(one.model, [one.batch()], one.task, one.labels).compute()
    alone = [one.task.collate([row], one.tokenizer) for row in features]
    assert evaluate(one.model, alone, one.task, one.labels).compute() == pytest.approx(whole, abs=1e-5)
    guesses = one.logits().argmax(-1)[one.batch()["labels"] != -100]
    right = one.batch()["labels"][one.batch()["labels"] != -100]
    assert whole["accuracy"] == pytest.approx(float((guesses == right).float().mean()))


def test_it_runs_in_eval_mode(setting: Callable[..., Any]) -> None:
    one = setting()
    for module in one.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    one.model.train()
    first, second = (evaluate(one.model, [one.batch()], one.task, one.labels).compute() for _ in range(2))
    assert first == second
    assert not one.model.training


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")])
def test_the_largest_difference_of_what_counts(setting: Callable[..., Any], family: str, task: str) -> None:
    one, other = setting(family, task), setting(family, task, seed=1)
    batches = [one.batch(), one.batch()]
    logits = (type("", (), {"logits": one.logits(model)}) for model in (one.model, other.model))
    first, second = (one.task.predictions(each, batches[0]) for each in logits)
    expected = (first - second).abs().max()
    assert largest_difference(one.model, other.model, batches, one.task) == pytest.approx(float(expected))
    assert largest_difference(one.model, one.model, batches, one.task) == 0.0
