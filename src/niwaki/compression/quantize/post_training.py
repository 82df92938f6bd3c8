"""What the methods have in common that choose the integers of a weight once, after the fit."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.compression.calibration import block_by_block, check_rows
from niwaki.compression.quantize.integers import FixedGrid, to_integers
from niwaki.compression.quantize.layout import Layout, check_bits
from niwaki.compression.targets import Targets, check_targets, chosen
from niwaki.edits import Edit
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage
from niwaki.weights import stack


@dataclass(frozen=True, kw_only=True)
class PostTraining(Stage):
    """`bits`: of a weight, 2 to 8. `targets`: a regular expression on the whole name of a linear, or a list of the
    parts that they play; null for all linears of the blocks."""

    phase: ClassVar[Phase] = Phase.QUANTIZE
    during_fit: ClassVar[bool] = False

    bits: int = 8
    targets: Targets = None

    def __post_init__(self) -> None:
        check_bits(self.bits, self.layout.group, self.field)
        check_targets(self.targets, self.field)

    @property
    def layout(self) -> Layout:
        """How the integers are laid out."""
        return Layout(bits=self.bits)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        self.layout.check(self.linears(anatomy, targets), self.field)

    def linears(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
        """The linears that it acts on."""
        return chosen(self.targets, self.field, anatomy, targets)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        for linear in self.linears(context.anatomy, context.targets).values():
            stack(linear, self.fixed(linear.weight.detach()))
        return Effects()

    @abc.abstractmethod
    def fixed(self, weight: Tensor) -> FixedGrid:
        """The integers of a weight (out, in), as the links below leave it."""

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        return to_integers(model, context, self.layout, self.activation_bits)

    @property
    def activation_bits(self) -> int | None:
        """Of what enters the linears; null: it stays as it is."""
        return None


@dataclass(frozen=True, kw_only=True)
class Grouped(PostTraining):
    """`group`: neighbouring inputs of a channel that share a scale; null for the whole channel. `symmetric`: codes
    around 0; else each scale has a zero beside it. Activations stay as they are, and the product is one of the weight
    that the codes stand for."""

    bits: int = 4
    group: int | None = 32
    symmetric: bool = True

    @property
    def layout(self) -> Layout:
        return Layout(bits=self.bits, group=self.group, zero="none" if self.symmetric else "whole")


@dataclass(frozen=True, kw_only=True)
class CalibratedGrid(PostTraining):
    """`rows`: rows of the training split that are looked at. Block after block is looked at and quantized, so that
    later ones see what the quantized ones before them give."""

    rows: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rows(self.rows, self.field)

    def conflict(self, others: Sequence[Stage]) -> str | None:
        return several_codes(self.name, others) or super().conflict(others)

    @abc.abstractmethod
    def statistic(self, values: Tensor) -> Any:
        """What is added up over batches, from what enters a linear: (tokens, inputs)."""

    @abc.abstractmethod
    def quantize(self, linears: Mapping[str, nn.Linear], statistic: Any, context: Context) -> None:
        """Put linears that read the same on their grids."""

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        linears = self.linears(context.anatomy, context.targets)

        def act(found: dict[str, Any]) -> None:
            for names in reading_the_same(found):
                self.quantize({name: linears[name] for name in names}, found[names[0]], context)

        block_by_block(model, context, self.rows, linears, self.statistic, act, self.field)
        return Effects()

    def fixed(self, weight: Tensor) -> FixedGrid:
        return nearest(weight, self.layout)


def several_codes(name: str, others: Sequence[Stage]) -> str | None:
    """The reason why a method that chooses the code of each weight cannot be combined with one of `others`, or None."""
    sharing = next((other.name for other in others if other.phase is Phase.SHARE), None)
    return sharing and (
        f"{name} and {sharing}: it chooses the code of each weight by itself, and weights that share a value would "
        "have several; use quantize/weight_only or quantize/int8"
    )


def reading_the_same(found: Mapping[str, Any]) -> list[list[str]]:
    """The names of linears that the same enters, which shows in statistics that are equal to the last bit."""
    groups: list[list[str]] = []
    for name, statistic in found.items():
        same = next((group for group in groups if equal(found[group[0]], statistic)), None)
        if same is None:
            groups.append([name])
        else:
            same.append(name)
    return groups


def equal(first: Any, second: Any) -> bool:
    """Whether two statistics are the same: tensors, numbers, or what holds some."""
    if isinstance(first, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    if hasattr(first, "__dict__"):
        return all(equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    return bool(first == second)


def nearest(
    weight: Tensor, layout: Layout, factor: Tensor | None = None, *, at_run_time: bool = True, **more: Any
) -> FixedGrid:
    """The grid that just holds a weight (out, in), and the nearest codes on it; with a `factor` (in,) for the input, of
    the weight divided by it. `at_run_time`: the grid has the factor; else the input comes with it."""
    grouped = layout.grouped(weight if factor is None else weight / factor)
    own = factor if at_run_time else None
    return with_codes(weight.shape, layout, grouped, *layout.grid_of(grouped), factor=own, **more)


def with_codes(
    shape: torch.Size, layout: Layout, grouped: Tensor, scale: Tensor, zero: Tensor | None, **more: Any
) -> FixedGrid:
    """The nearest codes on a grid (out, groups, 1), of (out, groups, inputs of a group)."""
    codes = layout.codes_of(grouped, scale, zero).reshape(shape)
    return FixedGrid(layout, codes, scale[..., 0], None if zero is None else zero[..., 0], **more)
