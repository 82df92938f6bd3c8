"""A text, or a pair of texts, as the tokens of one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from niwaki.task.task import Rows, pad


def tokenized(rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Rows:
    """The columns `text` and, where it is there, `text_pair`, cut to `max_length` tokens, of a pair the longer."""
    pairs = (list(rows["text_pair"]),) if "text_pair" in rows else ()
    encoded = dict(tokenizer(list(rows["text"]), *pairs, truncation=True, max_length=max_length))
    encoded.pop("attention_mask", None)
    if not pairs:
        encoded.pop("token_type_ids", None)
    return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}


def batch_of(encoded: Rows, tokenizer: Any, device: Any) -> dict[str, Tensor]:
    """What a model reads of encoded rows, padded, on its device."""
    features = rows_of({name: values for name, values in encoded.items() if name != "length"})
    return {name: value.to(device) for name, value in pad(features, tokenizer).items()}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows as columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
