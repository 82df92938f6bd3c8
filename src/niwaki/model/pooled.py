"""Heads on the mean of what leaves the backbone, in place of the head that transformers has (Reimers & Gurevych 2019,
arXiv:1908.10084)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from niwaki.errors import ConfigError
from niwaki.model.anatomy import family_of

AUTO_CLASS = "AutoModelForSequenceClassification"  # of the models that take such a head: it has a backbone of its own
NAME = "head"


@dataclass
class Embedded(ModelOutput):
    """What a head makes of texts, `logits` (rows, classes), and their `embedding` (rows, width), of length 1."""

    logits: Tensor | None = None
    embedding: Tensor | None = None


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of the states (rows, tokens, width) where the mask (rows, tokens) is 1: (rows, width), in fp32."""
    seen = mask[..., None].float()
    return (states.float() * seen).sum(1) / seen.sum(1).clamp(min=1)


def width_of(model: Any) -> int:
    """The width of what leaves the backbone."""
    return int(getattr(model.config, "hidden_size", 0) or model.get_input_embeddings().weight.shape[1])


def put_on(model: Any, head: nn.Module) -> None:
    """Let `head` read the normalised mean of the last states of a model, which may be empty (meta device); the head
    that it had, and its pooler, go."""
    backbone, pooler = model.base_model, family_of(model.config).pooler
    for name, child in list(model.named_children()):
        if child is not backbone:
            delattr(model, name)
    if pooler is not None and getattr(backbone, pooler, None) is not None:
        setattr(backbone, pooler, None)
    model.add_module(NAME, head)
    model.forward = MethodType(embed, model)


def embed(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
    **settings: Any,
) -> Embedded:  # fmt: skip
    """The forward pass of a model with such a head: texts (rows, tokens)."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    states = model.base_model(input_ids=input_ids, attention_mask=mask, **segments, **settings)[0]
    embedding = functional.normalize(mean_pooled(states, mask), dim=-1)
    return Embedded(logits=getattr(model, NAME)(embedding), embedding=embedding)


def refuse_decoder(config: Any, what: str) -> None:
    """Raise ConfigError for an encoder with a decoder, which has states of two texts."""
    if config.is_encoder_decoder:
        raise ConfigError(
            f"{what}: needs the states of one text, and a {config.model_type} has an encoder and a decoder; try "
            "model=minilm or model=tiny-bert"
        )
