"""Grids whose scales learn with the model, begin within the fit, or are held from a step on.

LSQ: Esser et al. 2019 (arXiv:1902.08153). PACT: Choi et al. 2018 (arXiv:1805.06085).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.quantize.integers import StraightThrough, largest_code
from niwaki.compression.quantize.layout import Layout
from niwaki.stage import Phase
from niwaki.weights import Link, entering

WeightScale = Literal["absmax", "lsq"]
InputScale = Literal["token", "observed", "lsq", "pact"]
LEAST = 1e-8  # a scale
NEWS = 0.01  # the share of a batch in a range that is observed


class LearnedStep(torch.autograd.Function):
    """v -> clip(round(v / s), low, high) * s. dL/dv is that of the output where v / s lies within, else 0; dL/ds sums
    round(v / s) - v / s there, and low or high beyond, times `gain` (LSQ, equations 3 and 5)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int, gain: float) -> Tensor:
        ratio = values.float() / step
        codes = ratio.round().clamp(low, high)
        ctx.save_for_backward(ratio, codes)
        ctx.bounds, ctx.gain, ctx.shape = (low, high), gain, step.shape
        return (codes * step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        ratio, codes = ctx.saved_tensors
        low, high = ctx.bounds
        within = (ratio >= low) & (ratio <= high)
        of_step = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(within, codes - ratio, codes)
            of_step = (gradients[0].float() * slope).sum_to_size(ctx.shape) * ctx.gain
        return gradients[0] * within, of_step, None, None, None


class Flags(nn.Module):
    """Switches that a checkpoint keeps, and that nothing waits for a device to read."""

    def __init__(self, **flags: bool) -> None:
        super().__init__()
        self.names = list(flags)
        for name, value in flags.items():
            self.register_buffer(name, torch.tensor(value))
        self.now = dict(flags)

    def set(self, name: str) -> None:
        """Switch one on."""
        getattr(self, name).fill_(True)
        self.now[name] = True

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.now = {name: bool(getattr(self, name)) for name in self.names}


class InputGrid(nn.Module):
    """One scale for all that enters a linear, drawn from the first batch of the fit that runs through it.

    lsq: the step s itself learns. pact: clip(x, -a, a) with a learned end a, and s = a / q; the gradient of a is that
    of what lies beyond it, and of its decay (`Decay`). PACT's activations are positive, these lie around 0. observed:
    so with an end that is the moving average of max|x| over the batches of the fit, and has no gradient.
    """

    learned: Tensor

    def __init__(self, bits: int, kind: InputScale) -> None:
        super().__init__()
        self.last = largest_code(bits)
        self.kind = kind
        if kind == "observed":
            self.register_buffer("learned", torch.ones(1))
        else:
            self.learned = nn.Parameter(torch.ones(1))
        self.flags = Flags(drawn=False)

    @property
    def drawn(self) -> bool:
        """Whether the scale is that of some activations."""
        return self.flags.now["drawn"]

    @property
    def step(self) -> Tensor:
        """s, (1,)."""
        size = self.learned.abs().clamp(min=LEAST)
        return size if self.kind == "lsq" else size / self.last

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """Let a batch move the end of the range."""
        largest = values.float().abs().max().clamp(min=LEAST)
        if self.drawn:
            self.learned.lerp_(largest, NEWS)
        else:
            self._draw(values)

    def forward(self, values: Tensor) -> Tensor:
        if not self.drawn:
            if not self.training:
                return StraightThrough.apply(values, (self.last + 1).bit_length())
            self._draw(values)
        if self.kind == "lsq":
            gain = 1 / math.sqrt(values.shape[-1] * self.last)
            return LearnedStep.apply(values, self.step, -self.last, self.last, gain)
        end = self.learned.abs().clamp(min=LEAST).to(values.dtype)
        clipped = torch.maximum(torch.minimum(values, end), -end)
        step = self.step.detach()
        rounded = ((clipped.float() / step).round() * step).to(values.dtype)
        return clipped + (rounded - clipped).detach()

    @torch.no_grad()
    def _draw(self, values: Tensor) -> None:
        sizes = values.float().abs()
        start = 2 * sizes.mean() / math.sqrt(self.last) if self.kind == "lsq" else sizes.max()
        self.learned.fill_(float(start.clamp(min=LEAST)))
        self.flags.set("drawn")


class Decay:
    """A loss term: `weight` times the sum of the squares of the ends that have been drawn and still learn, so that a
    range gets narrower where nothing is gained by its width (PACT, section 3)."""

    def __init__(self, ranges: Sequence[InputGrid], weight: float) -> None:
        self.ranges = ranges
        self.weight = weight

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        ends = [one.learned for one in self.ranges if one.drawn and one.learned.requires_grad]
        nothing = self.ranges[0].learned.detach().new_zeros(())
        return self.weight * sum((end.square().sum() for end in ends), nothing)


class TrainedGrid(Link):
    """A grid that the fit runs through once it has `begun`: with a scale drawn from the weight at each step (absmax),
    held as it was at one (`hold`), or learned (lsq). (out, in)."""

    phase = Phase.QUANTIZE
    held: Tensor | None

    def __init__(
        self, shape: torch.Size, layout: Layout, scale: WeightScale, activation_bits: int | None, inputs: InputScale,
        *, begun: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layout = layout
        self.learns = scale == "lsq"
        self.activation_bits = activation_bits
        count = shape[0] * (shape[1] // (layout.group or shape[1]))
        if self.learns:
            self.step = nn.Parameter(torch.ones(count))
        else:
            self.register_buffer("held", torch.ones(count))
        self.inputs = InputGrid(activation_bits, inputs) if activation_bits and inputs != "token" else None
        self.flags = Flags(begun=begun, frozen=False)

    @property
    def begun(self) -> bool:
        """Whether what enters goes onto the grid."""
        return self.flags.now["begun"]

    @property
    def frozen(self) -> bool:
        """Whether the scales stay as they are."""
        return self.flags.now["frozen"]

    def begin(self, weight: Tensor) -> None:
        """Let what enters go onto the grid from now on; a scale that learns starts at 2 mean|w| / sqrt(q)."""
        self.flags.set("begun")
        if self.learns:
            with torch.no_grad():
                sizes = self.layout.grouped(weight).float().abs().mean(-1).flatten()
                self.step.copy_((2 * sizes / math.sqrt(self.layout.highest)).clamp(min=LEAST))

    def hold(self, weight: Tensor) -> None:
        """Keep all scales as they are now."""
        if not self.learns and self.held is not None:
            self.held.copy_(self.layout.grid_of(self.layout.grouped(weight))[0].flatten())
        self.flags.set("frozen")
        self.rest()

    def rest(self) -> None:
        """Let scales that are held learn no more."""
        if self.frozen:
            for parameter in self.parameters():
                parameter.requires_grad_(False)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.begun:
            return weight
        grouped = self.layout.grouped(weight)
        if not self.learns and not self.frozen:
            return StraightThrough.apply(grouped, self.layout.bits).reshape(weight.shape)
        gain = 1 / math.sqrt(grouped.shape[-1] * self.layout.highest)
        found: Tensor = LearnedStep.apply(grouped, self._scale(grouped), self.layout.lowest, self.layout.highest, gain)
        return found.reshape(weight.shape)

    def enter(self, values: Tensor) -> Tensor:
        """What enters the linear, rounded. A range is observed before the grid begins too, until scales are held."""
        if self.inputs is not None and self.inputs.kind == "observed" and self.training and not self.frozen:
            self.inputs.observe(values)
        if not self.begun or not self.activation_bits:
            return values
        if self.inputs is None:
            rounded: Tensor = StraightThrough.apply(values, self.activation_bits)
            return rounded
        found: Tensor = self.inputs(values)
        return found

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        grouped = self.layout.grouped(weight)
        scale = self._scale(grouped).detach()
        codes = self.layout.codes_of(grouped, scale, None)
        found = {"codes": codes.to(torch.int8).reshape(weight.shape), "scale": scale[..., 0]}
        if self.inputs is not None and self.inputs.drawn:
            found["input_scale"] = self.inputs.step.detach().reshape(())
        return found

    def _scale(self, grouped: Tensor) -> Tensor:
        """The scales, (out, groups, 1)."""
        if self.learns:
            return self.step.abs().clamp(min=LEAST).view(*grouped.shape[:-1], 1)
        if self.frozen and self.held is not None:
            return self.held.view(*grouped.shape[:-1], 1)
        return self.layout.grid_of(grouped)[0]


class GridSchedule(pl.Callback):
    """Begins grids at one optimizer step, and holds their scales from another one on."""

    def __init__(self, grids: Mapping[nn.Linear, TrainedGrid], *, begin: int, hold: int | None) -> None:
        self.grids = grids
        self.begin = begin
        self.hold = hold

    def on_train_start(self, *_: Any) -> None:
        for grid in self.grids.values():
            grid.rest()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for linear, grid in self.grids.items():
            if not grid.begun and trainer.global_step >= self.begin:
                grid.begin(entering(linear, grid))
            if self.hold is not None and not grid.frozen and trainer.global_step >= self.hold:
                grid.hold(entering(linear, grid))


class EnterGrid:
    """Forward pre-hook of a linear: its grid rounds what enters."""

    def __init__(self, grid: TrainedGrid) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.grid.enter(inputs[0]), *inputs[1:])
