"""BitFit: exactly the biases, and the head where it is new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.causal_lm import CausalLM
from niwaki.tuning.bitfit import BitFit


def learning(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_bert_by_name(setting: Callable[..., Any]) -> None:
    one = setting()
    BitFit().prepare(one.model, one.context())
    parts = (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
    )  # fmt: skip
    blocks = {f"bert.encoder.layer.{i}.{part}.bias" for i in range(3) for part in parts}
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert learning(one.model) == blocks | head | {"bert.embeddings.LayerNorm.bias"}


def test_a_head_that_is_not_new_stays_frozen(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    BitFit().prepare(one.model, one.context())
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert learning(one.model) == {f"model.layers.{i}.{part}.bias" for i in range(3) for part in parts}


def test_a_model_without_biases_is_refused_before_its_weights_are_loaded() -> None:
    spec = Tiny(name="llama", overrides={"attention_bias": False, "mlp_bias": False})
    anatomy = Anatomy.of(spec.empty(CausalLM(), ()))
    with pytest.raises(ConfigError, match=r"^tuning=bitfit: this llama model has no biases to train; use tuning="):
        BitFit().check(anatomy, anatomy.linears())
    whole = Anatomy.of(Tiny(name="llama").empty(CausalLM(), ()))
    BitFit().check(whole, whole.linears())
