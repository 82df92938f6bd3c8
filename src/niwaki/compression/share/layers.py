"""Cross-layer parameter sharing: several blocks run with one set of weights (ALBERT, Lan et al. 2020,
arXiv:1909.11942)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.repeated import ShareBlocks, check_sharable
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.share_layers"


@dataclass(frozen=True, kw_only=True)
class Layers(Stage):
    """x_{i+1} = block(x_i; w_g(i)): every block i of a stack runs, with the weights of its group g(i).

    `groups`: so many sets of weights, of neighbours (`arrangement=consecutive`: g(i) = floor(i k / n)) or in turns
    (`cyclic`: g(i) = i mod k). `lists`: the groups by the numbers of their blocks; others keep their own weights. Where
    block 0 alone holds something (T5, ModernBERT), it is in none. `start`: from the `first` block of a group, or from
    the `average` of their weights.

    A set of weights is there once: masks, integers and adapters are on it, so every use has them.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    paper: ClassVar[str] = "Lan et al. 2020, arXiv:1909.11942"

    groups: int | None = None
    arrangement: Literal["consecutive", "cyclic"] | None = None
    lists: Sequence[Sequence[int]] | None = None
    start: Literal["first", "average"] = "first"

    def __post_init__(self) -> None:
        if self.lists is not None:
            given = next((name for name in ("groups", "arrangement") if getattr(self, name) is not None), None)
            if given:
                raise ConfigError(f"{FIELD}.{given}={getattr(self, given)}: has no effect beside lists; leave one out")
            members = [block for group in self.lists for block in group]
            if not self.lists or any(len(group) < 2 for group in self.lists) or len(set(members)) != len(members):
                raise ConfigError(f"{FIELD}.lists={self.lists}: needs groups of at least 2 blocks, each block once")
        if self.groups is not None and self.groups < 1:
            raise ConfigError(f"{FIELD}.groups={self.groups}: needs a whole number of at least 1")
        if self.arrangement not in (None, "consecutive", "cyclic"):
            raise ConfigError(f"{FIELD}.arrangement={self.arrangement!r}: needs consecutive or cyclic")
        if self.arrangement is not None and self.groups in (None, 1):
            raise ConfigError(f"{FIELD}.arrangement={self.arrangement}: has no effect with one group; set groups=2")
        if self.start not in ("first", "average"):
            raise ConfigError(f"{FIELD}.start={self.start!r}: needs first or average")

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        check_sharable(anatomy, (), FIELD)
        groups = self.grouped(anatomy)
        if not groups:
            raise ConfigError(
                f"{FIELD}.groups={self.groups}: the model has {len(self.free(anatomy))} blocks that can share; needs "
                "fewer groups"
            )
        check_sharable(anatomy, groups, f"{FIELD}.lists={groups}")

    def outline(self, model: nn.Module) -> None:
        ShareBlocks(groups=self.grouped(Anatomy.of(model))).apply(model)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        edit = ShareBlocks(groups=self.grouped(context.anatomy))
        if self.start == "average":
            average(context.anatomy, edit.groups)
        context.facts["shared_blocks"] = edit.groups
        edit.apply(model)
        return Effects(edits=[edit])

    def free(self, anatomy: Anatomy) -> list[int]:
        """The numbers of the blocks that can share."""
        lowest = 1 if any(stack.first for stack in anatomy.stacks) else 0
        return list(range(lowest, len(anatomy.blocks_of(anatomy.stacks[0]))))

    def grouped(self, anatomy: Anatomy) -> list[list[int]]:
        """The groups of more than one block, by number."""
        if self.lists is not None:
            return [sorted(group) for group in self.lists]
        free, count = self.free(anatomy), self.groups or 1
        found: list[list[int]] = [[] for _ in range(count)]
        for place, block in enumerate(free):
            found[place % count if self.arrangement == "cyclic" else place * count // len(free)].append(block)
        return [group for group in found if len(group) > 1]


def average(anatomy: Anatomy, groups: Sequence[Sequence[int]]) -> None:
    """Give the first block of each group the mean of their parameters."""
    with torch.no_grad():
        for stack in anatomy.stacks:
            blocks = anatomy.blocks_of(stack)
            for group in groups:
                members = [dict(blocks[index].named_parameters()) for index in group]
                for name, parameter in members[0].items():
                    parameter.copy_(torch.stack([member[name] for member in members]).mean(0))
