"""Cross-entropy over those classes that a row has, where others stand beside them in a batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from niwaki.task.task import UNKNOWN

NEVER = -1e4  # the logit of a class that a row does not have: its chance is 0, and 0 * log 0 is 0


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The mean over rows whose label is known; 0 where there is none. What smoothing takes from the label goes to the
    classes that a row has, in equal parts. Logits (rows, classes), NEVER where a row has no such class."""
    logs = functional.log_softmax(logits.float(), -1)
    known = labels != UNKNOWN
    right = logs.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    there = logits > NEVER
    others = logs.where(there, 0.0).sum(-1) / there.sum(-1).clamp(min=1)
    losses = -(1 - smoothing) * right - smoothing * others
    return losses.where(known, 0.0).sum() / known.sum().clamp(min=1)
