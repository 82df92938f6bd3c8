"""Tiny masked language models: random ones, and those that find some words likeliest wherever they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trained

from niwaki.model.tiny import Tiny


def with_mask(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


KINDS = {name: lambda make=make: with_mask(make()) for name, make in trained.KINDS.items()}


def masked_lm(tokenizer: Any, family: str = "bert", likeliest: Sequence[str] = ()) -> Any:
    """A random model with as many tokens as the tokenizer has. `likeliest`: tokens that stand above all others, in
    their order, whatever the model reads."""
    from transformers import AutoModelForMaskedLM

    config = Tiny(name=family, dropout=0.3).config()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    numbers = tokenizer.convert_tokens_to_ids(list(likeliest))
    with torch.no_grad():
        for rank, number in enumerate(numbers):
            model.get_output_embeddings().bias[number] += 1000.0 * (len(numbers) - rank)
    return model


def save(place: Path, tokenizer: Any, **settings: Any) -> str:
    """Such a model as a folder."""
    masked_lm(tokenizer, **settings).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)
