"""Distillation of hidden states with a match of layers that is found anew in each batch (CoFi, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from niwaki.model.teacher import Said
from niwaki.model.text import text_of

MATCHED = 4  # layers of the teacher


@dataclass(frozen=True)
class LayerMatch:
    """Sum over layers i of the teacher of MSE(W_layer H_s^m(i), H_t^i), with m(i) the layer of the student, of those
    that are not pruned, that is nearest. Four layers of the teacher's first stack, evenly spread; padding does not
    count. `projection` is W_layer."""

    projection: nn.Module
    alive: Callable[[], Sequence[bool]]

    def __call__(self, student: Said, teacher: Said, batch: Mapping[str, Tensor]) -> Tensor:
        tokens = text_of(batch)
        ours, theirs = (said.flows[0].states[1:] for said in (student, teacher))
        candidates = [hidden for hidden, alive in zip(ours, self._alive(len(ours)), strict=True) if alive] or ours
        mapped = [self.projection(hidden[tokens].float()) for hidden in candidates]
        return matched_distance(mapped, [hidden.float() for hidden in spread(theirs)], tokens)

    def _alive(self, count: int) -> list[bool]:
        """Which outputs are of a layer that is not pruned; shared blocks are used again and again."""
        alive = list(self.alive()) or [True]
        return [alive[i * len(alive) // count] if count % len(alive) == 0 else True for i in range(count)]


def spread(layers: Sequence[Tensor]) -> list[Tensor]:
    """Four layers, evenly spread, the last among them (3, 6, 9 and 12 of 12); all where there are no more."""
    count = len(layers)
    if count <= MATCHED:
        return list(layers)
    return [layers[count * k // MATCHED - 1] for k in range(1, MATCHED + 1)]


def matched_distance(students: Sequence[Tensor], teachers: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Sum over the teacher's layers of the mean squared distance to the nearest layer; `students`: (texts' tokens,
    width) each, `teachers`: (texts, tokens, width) each, of which `tokens` count."""
    total = students[0].new_zeros(())
    for teacher in teachers:
        target = teacher[tokens]
        total = total + torch.stack([(student - target).square().mean() for student in students]).min()
    return total
