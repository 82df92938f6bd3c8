"""Depth of every parameter, and norms by their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.model.anatomy import Anatomy
from niwaki.model.depth import depths, height, is_norm, norm_parameters
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification
from niwaki.tuning.lora import LoRA

ABOVE = {
    ("bert", "classification"): {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    },
    ("bert", "ner"): {"classifier.weight", "classifier.bias"},
    ("llama", "classification"): {"score.weight", "model.norm.weight"},
    ("llama", "causal_lm"): {"model.norm.weight"},  # the output layer is tied to the embeddings
}  # fmt: skip


@pytest.mark.parametrize(("family", "task"), ABOVE)
def test_depth_by_name(setting: Callable[..., Any], family: str, task: str) -> None:
    anatomy = Anatomy.of(setting(family, task).model)
    found = depths(anatomy)
    assert set(found) == {name for name, _ in anatomy.model.named_parameters()}
    assert height(anatomy) == 3
    for index in range(3):
        block = {n for n in found if f".layer.{index}." in n or f".layers.{index}." in n}
        assert block
        assert {n for n, depth in found.items() if depth == 3 - index} == block
    assert {n for n, depth in found.items() if depth == 0} == ABOVE[family, task]
    assert {n for n, depth in found.items() if depth == 4} == {n for n in found if "embed" in n}


def test_adapters_are_as_deep_as_their_block(setting: Callable[..., Any]) -> None:
    one = setting()
    LoRA(rank=2).prepare(one.model, one.context())
    found = depths(Anatomy.of(one.model))
    assert found["bert.encoder.layer.2.attention.self.query.lora_A.default.weight"] == 1
    assert found["bert.encoder.layer.0.output.dense.lora_B.default.weight"] == 3


def test_a_block_that_is_used_twice_counts_where_it_is_highest(setting: Callable[..., Any]) -> None:
    model = setting().model
    model.bert.encoder.layer[0] = model.bert.encoder.layer[1]
    found = depths(Anatomy.of(model))
    assert {depth for name, depth in found.items() if ".layer." in name} == {1, 2}


def test_on_an_empty_model() -> None:
    anatomy = Anatomy.of(Tiny(layers=[0, 2]).empty(Classification(), ("a", "b")))
    assert height(anatomy) == 2
    assert set(depths(anatomy).values()) == {0, 1, 2, 3}


SMALL: dict[str, tuple[dict[str, Any], str]] = {  # family: (its config, what stands in the names of its norms)
    "t5": ({"d_model": 8, "num_layers": 1, "d_ff": 8, "num_heads": 1, "d_kv": 8, "vocab_size": 8}, "layer_norm"),
    "gpt2": ({"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 8}, "ln_"),
    "distilbert": ({"dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8, "vocab_size": 8}, "norm"),
    "gemma2": (
        {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
         "head_dim": 8, "intermediate_size": 8, "vocab_size": 8}, "norm",
    ),
    "bart": (
        {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "vocab_size": 8,
         "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}, "norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_norms_of_any_family_are_found_by_their_type(family: str) -> None:
    from transformers import AutoConfig, AutoModel

    settings, part = SMALL[family]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    found = norm_parameters(model)
    assert found
    assert set(found) == {name for name, _ in model.named_parameters() if part in name.lower()}
    assert all(parameter.ndim == 1 for parameter in found.values())


def test_what_is_a_norm() -> None:
    class OddRMSNorm(nn.Module):
        pass

    assert all(is_norm(module) for module in (nn.LayerNorm(2), nn.RMSNorm(2), OddRMSNorm()))
    assert not any(is_norm(module) for module in (nn.Linear(2, 2), nn.Embedding(2, 2), nn.Dropout()))
