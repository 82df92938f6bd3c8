"""Factors of what enters linears: where they can stand instead, so that no run has to multiply by them (Xiao et al.
2022, arXiv:2211.10438; Lin et al. 2023, arXiv:2306.00978)."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.compression.calibration import to_device
from niwaki.compression.quantize.integers import FixedGrid
from niwaki.compression.quantize.post_training import CalibratedGrid
from niwaki.model.anatomy import Anatomy
from niwaki.model.units import Kind, units_of
from niwaki.stage import Context
from niwaki.weights import links

CHECKED = 8  # rows on which a place is tried


@dataclass(frozen=True)
class Place:
    """What linears read, where it can be multiplied by their factor: a norm, or rows of a linear that is on its grid.

    `tensors`: (outputs, ...) each, which make the outputs larger by as much as they are themselves. `source`: (in,), by
    input of the linears the output that it comes from, each from one of its own.
    """

    tensors: Sequence[Tensor]
    source: Tensor

    @torch.no_grad()
    def multiply(self, factor: Tensor) -> None:
        """Multiply the outputs by the factors (in,) of the inputs that they become."""
        for tensor in self.tensors:
            whole = torch.ones(len(tensor), dtype=tensor.dtype, device=tensor.device)
            whole[self.source] = factor.to(whole)
            tensor.mul_(whole.view(-1, *[1] * (tensor.dim() - 1)))


@dataclass(frozen=True, kw_only=True)
class Factored(CalibratedGrid):
    """`fold`: factors of the inputs go into what comes before, wherever nothing else reads that, and cost nothing at
    run time; else inputs are multiplied as they enter. Both are one function, up to the rounding of floats.

    They go into norms, from the output of attention into values, and into the feed-forward's linear that an activation
    lets through (the one that a gate multiplies; any behind ReLU). Not into a value head of several query heads:
    they would have to have one factor.
    """

    fold: bool = True

    def quantize(self, linears: Mapping[str, nn.Linear], statistic: Any, context: Context) -> None:
        place = place_before(context, linears) if self.fold else None
        factor = self.factor(linears, statistic)
        self.put(linears, statistic, factor, context, at_run_time=place is None)
        if place is not None:
            place.multiply(factor)

    @abc.abstractmethod
    def factor(self, linears: Mapping[str, nn.Linear], statistic: Any) -> Tensor:
        """What the inputs of linears that read the same are multiplied by, (in,)."""

    @abc.abstractmethod
    def put(
        self, linears: Mapping[str, nn.Linear], statistic: Any, factor: Tensor, context: Context, *, at_run_time: bool
    ) -> None:
        """Put the linears, divided by the factor of their input, on their grids. `at_run_time`: the input is multiplied
        as it enters; else it comes so."""


def place_before(context: Context, linears: Mapping[str, nn.Linear]) -> Place | None:
    """Where the factor that is common to these linears can stand; None where it has to stay theirs."""
    modules = list(linears.values())
    return next((place for place in candidates(context.anatomy, linears) if stands(context, place, modules)), None)


def candidates(anatomy: Anatomy, linears: Mapping[str, nn.Linear]) -> Iterator[Place]:
    """The places that the anatomy tells of: the norm before these linears, or before a single one what it reads."""
    norms, inputs = {anatomy.norm_before(name) for name in linears}, [one.in_features for one in linears.values()]
    norm = norms.pop() if len(norms) == 1 else None
    if norm is not None:
        scales = list(anatomy.model.get_submodule(norm).parameters())
        if scales and all(scale.shape == (inputs[0],) for scale in scales):
            yield Place(scales, torch.arange(inputs[0], device=scales[0].device))
    if len(linears) == 1:
        (linear,) = linears.values()
        yield from rows_before(anatomy, linear, "heads", ("value",))
        yield from rows_before(anatomy, linear, "neurons", ("feed_in", "feed_gate"))


def rows_before(anatomy: Anatomy, linear: nn.Linear, kind: Kind, parts: Sequence[str]) -> Iterator[Place]:
    """The rows of the sublayer that ends in `linear` which play one of these parts, where they are on their grid."""
    try:
        found = units_of(anatomy, kind)
    except (ValueError, TypeError):  # its sublayers are not built of units
        return
    for units in found:
        if anatomy.model.get_submodule(units.output) is not linear:
            continue
        for name, widths in units.rows.items():
            before: Any = anatomy.model.get_submodule(name)
            grid = next((link for link in links(before) if isinstance(link, FixedGrid)), None)
            for segment, part in enumerate(anatomy.parts_of(name)):
                if grid is None or part not in parts:
                    continue
                start, width = units.count * sum(widths[:segment]), widths[segment]
                inputs = torch.arange(linear.in_features, device=grid.scale.device)
                source = start + inputs // units.columns * width + inputs % width
                if len(source.unique()) == len(source):
                    yield Place([grid.scale, *([] if before.bias is None else [before.bias])], source)


def stands(context: Context, place: Place, linears: Iterable[nn.Linear]) -> bool:
    """Whether nothing but these linears reads a place, and what lies between only passes its factors on.

    Tried on training rows: outputs are multiplied by powers of two and what enters the linears is divided by them. No
    float is rounded by that, so the logits are the same to the last bit, or something else had a part in them.
    """
    generator = torch.Generator().manual_seed(0)
    outputs = len(place.tensors[0])
    exponents = torch.tensor([-2.0, -1.0, 1.0, 2.0])[torch.randint(4, (outputs,), generator=generator)]
    powers = exponents.exp2().to(place.source.device)[place.source]
    expected = logits(context)
    handles = [linear.register_forward_pre_hook(lambda _, given: (given[0] / powers, *given[1:])) for linear in linears]
    place.multiply(powers)
    try:
        return torch.equal(logits(context), expected)
    finally:
        place.multiply(1 / powers)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(context: Context) -> Tensor:
    """Of some training rows."""
    model: Any = context.anatomy.model
    batch = to_device(context.calibration(CHECKED)[0], next(model.parameters()).device)
    found: Tensor = model(**context.inputs(batch)).logits
    return found
