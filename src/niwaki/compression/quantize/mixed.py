"""Bits by linear, as far as the predictions mind its rounding (ZeroQ, Cai et al. 2020, arXiv:2001.00281)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import floor, isfinite
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from niwaki.compression.calibration import (
    block_by_block,
    check_rows,
    cholesky_of_inverse,
    evaluating,
    inside,
    recorded,
    replayed,
    to_device,
)
from niwaki.compression.distill.divergence import kl, of_numbers
from niwaki.compression.quantize.gptq import GPTQ, rounded
from niwaki.compression.quantize.integers import to_integers
from niwaki.compression.quantize.layout import Layout, check_bits
from niwaki.compression.quantize.post_training import nearest, reading_the_same, several_codes
from niwaki.compression.targets import Targets, check_targets, chosen
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage
from niwaki.weights import stack

Rounding = Literal["nearest", "gptq"]
LARGEST_PART = 2**24  # logits of either side that are compared at once


@dataclass(frozen=True, kw_only=True)
class Mixed(Stage):
    """Of all k with sum_i n_i k_i <= `bits` sum_i n_i, n_i the weights of linear i and k_i one of `choices`, the one
    with the least sum_i Omega_i(k_i), where

        Omega_i(k) = mean KL(M || M with linear i alone rounded to k bits)

    over the positions that count of `rows` rows of the training split, in place of ZeroQ's synthetic ones. That linears
    do not mind each other's rounding is assumed, as there. The choice is the best one, not a greedy one: the point of
    the Pareto frontier at that size (HAWQ-V2, Dong et al. 2019, arXiv:1911.03852, whose Omega_i is the mean eigenvalue
    of the Hessian times ||Q(W_i) - W_i||^2). It costs a pass over the rows for each linear and choice, from the block
    that holds the linear on.

    `bits` counts codes alone; the scales of `group` inputs each come on top, as many for any choice. `rounding`: to the
    nearest code, or as quantize/gptq does with the settings that it has by default, block after block, over the same
    rows; Omega is that of the nearest codes either way.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    during_fit: ClassVar[bool] = False
    paper: ClassVar[str] = "Cai et al. 2020, arXiv:2001.00281; Dong et al. 2019, arXiv:1911.03852"

    bits: float = 4.0
    choices: Sequence[int] = (2, 3, 4, 8)
    group: int | None = 32
    symmetric: bool = True
    rounding: Rounding = "nearest"
    rows: int = 128
    targets: Targets = None

    def __post_init__(self) -> None:
        shown = f"{self.field}.choices={list(self.choices)}"
        if not self.choices or len(set(self.choices)) < len(self.choices) or set(self.choices) - set(range(2, 9)):
            raise ConfigError(f"{shown}: needs whole numbers from 2 to 8, at least one, each once")
        least, largest = min(self.choices), max(self.choices)
        if not least <= self.bits <= largest:
            raise ConfigError(
                f"{self.field}.bits={self.bits}: needs a number from {least} to {largest}, the ends of "
                f"choices={list(self.choices)}"
            )
        check_bits(least, self.group, self.field)
        if self.rounding not in get_args(Rounding):
            raise ConfigError(f"{self.field}.rounding={self.rounding!r}: needs one of {', '.join(get_args(Rounding))}")
        check_rows(self.rows, self.field)
        check_targets(self.targets, self.field)

    def layout(self, bits: int) -> Layout:
        """How codes of so many bits are laid out."""
        return Layout(bits=bits, group=self.group, zero="none" if self.symmetric else "whole")

    def conflict(self, others: Sequence[Stage]) -> str | None:
        cutting = next((o for o in others if o.leaves_out_units and getattr(o, "schedule", "") != "one_shot"), None)
        if cutting:
            return (
                f"{self.name} and {cutting.name}: how many weights each linear will have is not known when its bits "
                "are chosen; use schedule=one_shot where it has one, or quantize/gptq with group=null"
            )
        return several_codes(self.name, others)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        self.layout(min(self.choices)).check(self.linears(anatomy, targets), self.field)

    def linears(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
        """The linears that it acts on."""
        return chosen(self.targets, self.field, anatomy, targets)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        linears = self.linears(context.anatomy, context.targets)
        omega = sensitivities(model, context, self.rows, linears, [self.layout(b) for b in self.choices], self.field)
        sizes = [linear.weight.numel() for linear in linears.values()]
        budget = floor(Fraction(str(self.bits)) * sum(sizes))
        costs = [[size * bits for bits in self.choices] for size in sizes]
        best = least_loss(costs, list(omega.values()), budget)
        bits = {name: self.choices[number] for name, number in zip(linears, best, strict=True)}
        self.round(model, context, linears, {name: self.layout(found) for name, found in bits.items()})
        context.facts["mixed"] = {
            "average_bits": sum(cost[number] for cost, number in zip(costs, best, strict=True)) / sum(sizes),
            "divergence": sum(losses[number] for losses, number in zip(omega.values(), best, strict=True)),
        }
        context.facts["mixed_bits"] = bits
        context.facts["mixed_sensitivity"] = {
            name: {f"{found}": loss for found, loss in zip(self.choices, losses, strict=True)}
            for name, losses in omega.items()
        }
        return Effects()

    def round(
        self, model: nn.Module, context: Context, linears: Mapping[str, nn.Linear], layouts: Mapping[str, Layout]
    ) -> None:
        """Put each linear on a grid of its own layout."""
        if self.rounding == "nearest":
            for name, linear in linears.items():
                stack(linear, nearest(linear.weight.detach(), layouts[name]))
            return

        def act(found: dict[str, Any]) -> None:
            for names in reading_the_same(found):
                factor = cholesky_of_inverse(2 * found[names[0]], GPTQ.damping)
                for name in names:
                    stack(linears[name], rounded(linears[name].weight.detach(), factor, layouts[name], GPTQ.columns))

        block_by_block(model, context, self.rows, linears, lambda values: values.T @ values, act, self.field)

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        bits: dict[str, int] = context.facts["mixed_bits"]
        by_bits = {number: [name for name, found in bits.items() if found == number] for number in self.choices}
        return [
            edit
            for number, names in by_bits.items()
            if names
            for edit in to_integers(model, context, self.layout(number), None, names=names)
        ]


def sensitivities(
    model: nn.Module, context: Context, rows: int, linears: Mapping[str, nn.Linear], layouts: Sequence[Layout],
    field: str,
) -> dict[str, list[float]]:  # fmt: skip
    """Omega of each linear for each layout, over `rows` rows of the training split, in eval mode.

    Raises:
        ConfigError: no position of the rows counts, or a divergence is no finite number; names the `field`.
    """
    sums, positions = {name: [0.0] * len(layouts) for name in linears}, 0
    blocks = [(block, inside(place, linears)) for place, _, block in context.anatomy.named_blocks()]
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), parametrize.cached():
        for batch in (to_device(one, device) for one in context.calibration(rows)):

            def predictions(batch: Mapping[str, Tensor] = batch) -> Tensor:
                return context.predictions(model(**context.inputs(batch)), batch)

            with recorded([block for block, _ in blocks]) as calls:
                whole = predictions()
            positions += len(whole)
            for block, names in blocks if len(whole) else ():
                entered = next((number for number, (called, _) in enumerate(calls) if called is block), len(calls))
                for name, (number, layout) in product(names, enumerate(layouts)):
                    with replayed(calls[:entered]), alone(linears[name], layout):
                        sums[name][number] += divergence(whole, predictions())
    if not positions:
        raise ConfigError(f"{field}.rows={rows}: the training split has no position among them that counts; take more")
    for name, found in sums.items():
        if not all(map(isfinite, found)):
            raise ConfigError(
                f"{field}: with {name} rounded the predictions are no finite numbers; leave it out by targets"
            )
    return {name: [total / positions for total in found] for name, found in sums.items()}


@contextmanager
def alone(linear: nn.Linear, layout: Layout) -> Iterator[None]:
    """Within: the linear computes with the nearest codes of the weight that its chain gives."""
    weight = linear.weight.detach()
    values = nearest(weight, layout)(weight)
    handle = linear.register_forward_hook(lambda _, inputs, __: functional.linear(inputs[0], values, linear.bias))
    try:
        yield
    finally:
        handle.remove()


def divergence(first: Tensor, second: Tensor) -> float:
    """Sum over rows of KL(softmax(first) || softmax(second)), of logits (n, classes), in float64; of numbers (n, 1)
    that of normal distributions of variance 1 around them."""
    if first.shape[-1] == 1:
        return len(first) * float(of_numbers(first.double(), second.double()))
    most = max(1, LARGEST_PART // first.shape[-1])
    pairs = zip(first.split(most), second.split(most), strict=True)
    return sum(len(a) * float(kl(*(functional.log_softmax(side.double(), -1) for side in (a, b)))) for a, b in pairs)


def least_loss(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Of each item the number of one choice, such that the costs add up to `budget` at most and the losses to the least
    that there is; of equal ones that which costs least.

    Exact (multiple-choice knapsack): item after item, of all sums of cost and loss those stay that no other beats in
    both (Nemhauser & Ullmann 1969), which are never more than there are different sums of costs.
    """
    rest = np.cumsum([0, *(min(cost) for cost in reversed(costs))])[::-1]
    assert rest[0] <= budget
    spent, lost = np.zeros(1, np.int64), np.zeros(1)
    kept = []
    for cost, loss, needed in zip(costs, losses, rest[1:], strict=True):
        spent, lost = np.add.outer(spent, cost).ravel(), np.add.outer(lost, loss).ravel()
        order = np.lexsort((lost, spent))
        order = order[spent[order] <= budget - needed]
        least = np.minimum.accumulate(lost[order])
        kept.append(order[np.concatenate(([True], least[1:] < least[:-1]))])
        spent, lost = spent[kept[-1]], lost[kept[-1]]
    found, state = [], len(spent) - 1
    for before, cost in zip(reversed(kept), reversed(costs), strict=True):
        state, number = divmod(int(before[state]), len(cost))
        found.append(number)
    return found[::-1]
