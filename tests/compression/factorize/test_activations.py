"""The second moments of what linears read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.factorize.activations import second_moments, tokens


@pytest.mark.parametrize(("family", "task"), [("bert", "ner"), ("llama", "causal_lm"), ("t5", "classification")])
def test_every_token_but_padding_counts_once(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    one.model.train()
    linears = one.context().targets
    batch = one.batch()
    read: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, arguments, name=name: read[name].append(arguments[0]))
    one.logits()
    one.model.train()
    found = second_moments(one.model, linears, [batch, batch], one.task.inputs)
    assert one.model.training
    mask = batch["attention_mask"]
    assert not mask.all()
    for name, linear in linears.items():
        expected = torch.zeros(linear.in_features, linear.in_features)
        for row in range(len(mask)):
            for place in range(mask.shape[1]):
                if mask[row, place]:
                    token = read[name][0][row, place]
                    expected += torch.outer(token, token)
        assert torch.allclose(found[name].float(), 2 * expected, rtol=1e-4, atol=1e-4)
    assert all(len(values) == 3 for values in read.values())  # our own look, and two batches: no hook is left behind


def test_tokens_of_other_places_all_count() -> None:
    values = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]])
    assert torch.equal(tokens(values, mask), torch.stack([values[0, 0], values[0, 1], values[1, 0], values[1, 4]]))
    assert tokens(values, mask[:, :4]).shape == (10, 3)
    assert tokens(values[0], mask).shape == (5, 3)
    assert tokens(values, None).shape == (10, 3)
