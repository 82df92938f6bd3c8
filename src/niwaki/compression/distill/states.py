"""States of the text, without padding: means over them, the one that sums a row up, and a map to another width."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from niwaki.model.anatomy import Anatomy
from niwaki.model.text import text_of


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """The mean of `values` where `where` says; the shapes broadcast."""
    where = where.expand_as(values)
    return torch.where(where, values, 0.0).sum() / where.sum()


def pooled(states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean of each row's states of the last stack, (rows, width)."""
    text = text_of(batch, decoder=True)[..., None]
    return torch.where(text, states.float(), 0.0).sum(1) / text.sum(1)


def summary(states: Tensor, anatomy: Anatomy, batch: Mapping[str, Tensor], stack: int = -1) -> Tensor:
    """The state of each row that its classifier reads: of the first position ([CLS]), or of the last one of the text
    where a model reads from left to right, or the head reads the end token. (rows, width)"""
    if not (anatomy.causal or anatomy.reads_end):
        return states[:, 0].float()
    places = torch.arange(states.shape[1], device=states.device)
    last = torch.where(text_of(batch, decoder=stack != 0), places, 0).amax(1)
    return states[torch.arange(len(states), device=states.device), last].float()


def projection(student: Tensor, teacher: Tensor) -> nn.Module:
    """A learned map, without bias, from the width of the student's states to that of the teacher's; the identity where
    they are the same."""
    widths = student.shape[-1], teacher.shape[-1]
    return nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths, bias=False)


def learned(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that have something to learn."""
    return {name: module for name, module in modules.items() if any(True for _ in module.parameters())}
