"""Distillation of hidden states with a match of layers that is found anew in each batch (CoFi, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.model.anatomy import Anatomy

PROJECTION = "cofi_projection"  # child of the model, during the fit
MATCHED = 4  # layers of the teacher


class Watcher:
    """Keeps what the blocks of a model's first stack gave since `take`."""

    def __init__(self, model: nn.Module, *, while_training: bool) -> None:
        anatomy = Anatomy.of(model)
        self.while_training = while_training
        self.outputs: list[Tensor] = []
        self.hooks = [b.register_forward_hook(self) for b in anatomy.blocks_of(anatomy.stacks[0])]

    def __call__(self, block: nn.Module, args: Any, output: Any) -> None:
        if block.training or not self.while_training:
            self.outputs.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        """The outputs of the blocks, in the order of their use."""
        taken, self.outputs = self.outputs, []
        return taken


class LayerMatch:
    """The loss term: weight * sum over layers i of the teacher of MSE(W_layer H_s^m(i), H_t^i), with m(i) the layer of
    the student, of those that are not pruned, that is nearest. Four layers of the teacher, evenly spread; padding
    does not count. W_layer is the identity at the start, where the widths are equal."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, projection: nn.Linear, weight: float,
        alive: Callable[[], Sequence[bool]],
    ) -> None:  # fmt: skip
        self.teacher = teacher.eval().requires_grad_(False)
        self.seen = Watcher(student, while_training=True)
        self.shown = Watcher(teacher, while_training=False)
        self.projection = projection
        self.weight = weight
        self.alive = alive

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        device = batch["input_ids"].device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        names = ("input_ids", "attention_mask", "token_type_ids")
        with torch.no_grad():
            self.teacher(**{name: batch[name] for name in names if name in batch})
        tokens = batch["attention_mask"].bool()
        theirs, ours = self.shown.take(), self.seen.take()
        candidates = [hidden for hidden, alive in zip(ours, self._alive(len(ours)), strict=True) if alive] or ours
        return self.weight * matched_distance([self.projection(h[tokens]) for h in candidates], spread(theirs), tokens)

    def _alive(self, count: int) -> list[bool]:
        """Which outputs are of a layer that is not pruned; shared blocks are used again and again."""
        alive = list(self.alive()) or [True]
        return [alive[i * len(alive) // count] if count % len(alive) == 0 else True for i in range(count)]

    def remove(self) -> None:
        """Leave the models alone."""
        for hook in (*self.seen.hooks, *self.shown.hooks):
            hook.remove()


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
