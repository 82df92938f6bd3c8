"""Whether a word begins with a capital, is all in capitals, or has some inside, for models whose tokens do not tell: a
feature of its own beside that of the word (Collobert et al. 2011, arXiv:1103.0398)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.load import has_segments

PLAIN = 0  # the segment that any text is of; 1 is that of the second text of a pair
INITIAL, CAPITALS, INSIDE = SEGMENTS = (2, 3, 4)


def segment_of(word: str) -> int:
    """The segment that a word's pieces are of: PLAIN where it has no capital at all."""
    letters = [letter for letter in word if letter.isalpha()]
    capital = [letter.isupper() for letter in letters]
    if not any(capital):
        return PLAIN
    if capital[0] and not any(capital[1:]):
        return INITIAL
    return CAPITALS if all(capital) else INSIDE


def segments_of(kinds: Sequence[int], word_ids: Sequence[int | None]) -> list[int]:
    """`token_type_ids` of pieces of words of these `kinds`, PLAIN for those of none."""
    return [PLAIN if word is None else kinds[word] for word in word_ids]


def check_segments(config: Any) -> None:
    """Raise ConfigError for a config whose models have no segments."""
    if not has_segments(config):
        raise ConfigError(
            f"task.casing=true: needs a model with embeddings of segments (BERT, ELECTRA, ALBERT), and this "
            f"{config.model_type} has none; its tokens may tell capitals anyway: leave it false"
        )


def make_room(model: Any) -> None:
    """Give a model rows for these segments, which begin as that of any text: it computes what it did before."""
    parts = model.base_model.embeddings
    old: nn.Embedding = parts.token_type_embeddings
    rows = max(SEGMENTS) + 1 - old.num_embeddings
    if rows > 0:
        grown = nn.Embedding(max(SEGMENTS) + 1, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            grown.weight.copy_(torch.cat([old.weight, old.weight[:1].expand(rows, -1)]))
        parts.token_type_embeddings = grown
        model.config.type_vocab_size = grown.num_embeddings
