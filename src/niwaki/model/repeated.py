"""Blocks that run several times with one set of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy

Settings = Mapping[str, Mapping[str, Any]]
"""By the name of a module in a block: the plain attributes that are set on it for one use of the block."""


class RepeatedBlocks(nn.ModuleList):
    """A list of blocks in which one may stand several times. What tells its uses apart beside the weights (the number
    of the layer, by which a cache is found; a window of attention) is set when the block is taken out to be run."""

    def __init__(self, blocks: Iterable[nn.Module], settings: Sequence[Settings]) -> None:
        super().__init__(blocks)
        self.settings = list(settings)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> Any:
        blocks = list(self._modules.values())
        if isinstance(index, slice):
            return RepeatedBlocks(blocks[index], self.settings[index])
        block: Any = blocks[index]
        for name, attributes in self.settings[index].items():
            module = block.get_submodule(name)
            for attribute, value in attributes.items():
                setattr(module, attribute, value)
        return block


@dataclass(frozen=True, kw_only=True)
class ShareBlocks(Edit):
    """In every stack, the blocks of each group become the first of them. Their names stay those of the first use."""

    groups: list[list[int]]

    def apply(self, model: Any) -> None:
        anatomy = Anatomy.of(model)
        for stack in anatomy.stacks:
            blocks = anatomy.blocks_of(stack)
            first = {member: min(group) for group in self.groups for member in group}
            leader = [blocks[first.get(index, index)] for index in range(len(blocks))]
            settings: list[Settings] = [{} for _ in blocks]
            for group in self.groups:
                for member, found in zip(group, own_settings([blocks[i] for i in group]), strict=True):
                    settings[member] = found
            above, _, leaf = stack.blocks.rpartition(".")
            setattr(anatomy.backbone.get_submodule(above), leaf, RepeatedBlocks(leader, settings))


def own_settings(blocks: Sequence[nn.Module]) -> list[Settings]:
    """For each of some blocks of one structure: the plain attributes, module by module, in which they differ."""
    found: list[dict[str, dict[str, Any]]] = [{} for _ in blocks]
    for name, module in blocks[0].named_modules():
        plain = [plain_attributes(block.get_submodule(name)) for block in blocks]
        for attribute in plain_attributes(module):
            values = [attributes[attribute] for attributes in plain]
            if any(value != values[0] for value in values):
                for settings, value in zip(found, values, strict=True):
                    settings.setdefault(name, {})[attribute] = value
    return list(found)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, names and the like that a module's own code has set."""
    kinds = (bool, int, float, str, tuple, type(None))
    return {n: v for n, v in vars(module).items() if isinstance(v, kinds) and not n.startswith("_") and n != "training"}


def check_sharable(anatomy: Anatomy, groups: Sequence[Sequence[int]], setting: str) -> None:
    """Raise ConfigError, which names the `setting`, where these blocks cannot share weights."""
    heights = {len(anatomy.blocks_of(stack)) for stack in anatomy.stacks}
    if len(heights) > 1:
        raise ConfigError(f"{setting}: counts in every stack of the model alike, and they have different depths")
    height = heights.pop()
    for stack in anatomy.stacks:
        blocks = anatomy.blocks_of(stack)
        if ".*." in stack.blocks or len(anatomy.uses_of(stack)) != len(blocks):
            raise ConfigError(f"{setting}: the blocks of this model share their weights already")
        for group in groups:
            if stack.first and 0 in group:
                raise ConfigError(f"{setting}: needs 0 on its own, since {stack.first}")
            if any(not 0 <= index < height for index in group):
                raise ConfigError(f"{setting}: needs block numbers in 0..{height - 1}")
            refuse_other_shapes(blocks, group, setting)


def refuse_other_shapes(blocks: Sequence[nn.Module], group: Sequence[int], setting: str) -> None:
    """Raise ConfigError where the blocks of a group are not of one structure."""
    shapes = [{name: p.shape for name, p in blocks[index].named_parameters()} for index in group]
    for index, found in zip(group, shapes, strict=True):
        odd = sorted(name for name in {*found, *shapes[0]} if found.get(name) != shapes[0].get(name))
        if odd:
            raise ConfigError(f"{setting}: blocks {group[0]} and {index} differ in the shape of {odd[0]}")
