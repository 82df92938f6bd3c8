"""What the tests of tasks that write texts share: a tiny model with a task, and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from niwaki.model.tiny import Tiny


def tiny(family: str, task: Any, *, scale: float = 1.0) -> tuple[Any, Any]:
    """A tiny model in eval mode, its weights larger by `scale` so that it is surer, and its tokenizer."""
    spec = Tiny(name=family, dropout=0.0)
    model, tokenizer = spec.load(task, (), seed=0), spec.tokenizer()
    for parameter in model.parameters():
        parameter.data *= scale
    task.equip(tokenizer)
    return model.requires_grad_(False), tokenizer


def features(task: Any, tokenizer: Any, rows: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """The rows, encoded."""
    columns = task.encode(dict(rows), tokenizer, ())
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def batch_of(task: Any, tokenizer: Any, rows: Mapping[str, list[Any]]) -> dict[str, torch.Tensor]:
    """All rows as one batch."""
    batch: dict[str, torch.Tensor] = task.collate(features(task, tokenizer, rows), tokenizer)
    return batch


def without_padding(written: torch.Tensor) -> list[list[int]]:
    """Rows of tokens without what stands behind their ends."""
    return [[token for token in row if token >= 0] for row in written.tolist()]
