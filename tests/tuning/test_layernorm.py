"""LayerNorm tuning: the norms and a new head, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from niwaki.errors import ConfigError
from niwaki.tuning.layernorm import LayerNorm

BERT = {
    f"bert.encoder.layer.{i}.{place}.LayerNorm.{field}"
    for i in range(3)
    for place in ("attention.output", "output")
    for field in ("weight", "bias")
} | {"bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"}
LLAMA = {
    f"model.layers.{i}.{name}_layernorm.weight" for i in range(3) for name in ("input", "post_attention")
} | {"model.norm.weight"}  # fmt: skip
WANTED = {
    ("bert", "ner"): BERT | {"classifier.weight", "classifier.bias"},
    ("llama", "classification"): LLAMA | {"score.weight"},
    ("llama", "causal_lm"): LLAMA,
}


@pytest.mark.parametrize(("family", "task"), WANTED)
def test_what_learns_and_moves(setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    LayerNorm().prepare(one.model, one.context())
    assert {n for n, p in one.model.named_parameters() if p.requires_grad} == WANTED[family, task]
    before = {n: p.detach().clone() for n, p in one.model.named_parameters()}
    train(one.learner(), [one.batch()])
    assert {n for n, p in one.model.named_parameters() if bool((p != before[n]).any())} == WANTED[family, task]


def test_norms_without_weights_are_refused(setting: Callable[..., Any]) -> None:
    one = setting()
    LayerNorm().check(one.context().anatomy, {})
    for module in one.model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight = module.bias = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"^tuning=layernorm: the norms of this bert model have no weights; use"):
        LayerNorm().check(one.context().anatomy, {})
