"""Deciding which parameters learn."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def train_only(model: nn.Module, learning: Iterable[nn.Parameter]) -> None:
    """Freeze every parameter of `model` but those in `learning`."""
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
