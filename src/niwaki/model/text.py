"""Which positions of a batch are text, for each of the stacks of blocks that read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from niwaki.model.anatomy import Anatomy


def text_of(batch: Mapping[str, Tensor], decoder: bool = False) -> Tensor:
    """Which positions are text, and no padding: (rows, positions), bool. A decoder may read another text than the
    encoder; else both read the same."""
    mask = batch.get("decoder_attention_mask") if decoder else None
    mask = batch.get("attention_mask") if mask is None else mask
    found = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return found.flatten(0, -2)  # where a row is several texts, a model reads each by itself


def end_tokens(model: Any) -> Tensor:
    """The tokens that end a text of the model, those of its generation_config or else of its config: (tokens,)."""
    settings = getattr(model, "generation_config", None)
    ends = None if settings is None else settings.eos_token_id
    ends = getattr(model.config, "eos_token_id", None) if ends is None else ends
    return torch.tensor([] if ends is None else ends, dtype=torch.long).flatten()


def in_decoder(anatomy: Anatomy, name: str) -> bool:
    """Whether what the module of this name reads stands at the positions of the decoder's text: it is in the decoder
    behind an encoder, and no key or value of the attention to that encoder."""
    if len(anatomy.stacks) < 2:
        return False
    stack = anatomy.stacks[-1]
    inside = name.startswith(f"{anatomy.prefix}{stack.blocks.partition('.')[0]}.")
    crossing = [
        f"{place}.{linear}" for place, its, _ in anatomy.named_blocks() if its is stack
        for linear, parts in stack.linears.items()
        if stack.cross_attention and linear.startswith(f"{stack.cross_attention}.") and parts in ("key", "value")
    ]  # fmt: skip
    return inside and not any(name == one or name.startswith(f"{one}.") for one in crossing)
