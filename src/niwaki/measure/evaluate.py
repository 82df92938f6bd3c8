"""Scores of a model on a split, in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from niwaki.task.task import Scores, Task


def evaluate(
    model: Any, batches: Iterable[dict[str, Tensor]], task: Task, labels: Sequence[str], tokenizer: Any = None,
    *, watched: bool = False,
) -> Scores:  # fmt: skip
    """One pass over `batches`, in eval mode, without autocast; `watched`: for the score to watch alone."""
    device = next(model.parameters()).device
    scores = task.scores(labels, tokenizer)
    take = task.watch if watched else task.score
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            take(scores, model, moved)
    return scores


def largest_difference(first: Any, second: Any, batches: Iterable[dict[str, Tensor]], task: Task) -> float:
    """max |logits of first - logits of second| over the positions that count."""
    device = next(first.parameters()).device
    worst = 0.0
    with torch.inference_mode():
        for batch in batches:
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            one, two = (task.predictions(model(**task.inputs(moved)), moved) for model in (first, second))
            worst = max(worst, float((one.float() - two.float()).abs().max()))
    return worst
