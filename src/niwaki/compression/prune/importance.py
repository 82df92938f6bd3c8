"""How much a head, a neuron or a channel matters: its weights, its activation, or what the loss would lose without it.

Taylor: Molchanov et al. 2017 (arXiv:1611.06440), for heads Michel et al. 2019 (arXiv:1905.10650).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from niwaki.model.capture import passes_aside
from niwaki.model.stream import Stream
from niwaki.model.text import in_decoder, text_of
from niwaki.model.units import Units
from niwaki.stage import Context

Importance = Literal["magnitude", "taylor", "activation"]


def magnitude(model: nn.Module, units: Units) -> Tensor:
    """The l2 norm of everything that a unit owns: its rows, their biases, and its columns of the output. (units,)"""
    with torch.no_grad():
        squares = [part.square().sum(1) for part, _ in units.slices(model)]
        return torch.stack(squares).sum(0).sqrt()


class Parted(Protocol):
    """Something of `count` parts, of so many neighbouring `columns` each."""

    @property
    def count(self) -> int: ...
    @property
    def columns(self) -> int: ...


class Meter:
    """Forward pre-hook of what reads the units: gathers |activation|, or the Taylor term of each text.

    Taylor: with a factor xi of the unit's activation a, |dL/dxi| = |sum over tokens of a dL/d(xi a)| of each text. A
    block that is used several times has one xi. It is 1, or what a `gate` says: a closed unit is measured too.
    """

    def __init__(self, units: Parted, kind: Importance, gate: Any = None) -> None:
        self.units = units
        self.kind = kind
        self.gate = gate
        self.gathers = True
        self.batch: Mapping[str, Tensor] | None = None  # that goes through
        self.decoder = False  # whether the activations stand at the positions of the decoder's text
        self.factors: list[Tensor] = []  # of the forward passes since `collect`
        self._sums: Tensor = torch.zeros(units.count, dtype=torch.float64)
        self._count = 0  # of what the sums are of: texts, or tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        parted = args[0].unflatten(-1, (self.units.count, self.units.columns))
        gathers = self.gathers and not passes_aside()
        if gathers and self.kind == "activation":
            self._add_activation(parted.detach())
        if gathers and self.kind == "taylor" and torch.is_grad_enabled():
            factor = self._factor(parted)
            self.factors.append(factor)
        elif self.gate is not None:
            factor = self.gate.open[:, None]
        else:
            return args
        return ((parted * factor.to(parted.dtype)).flatten(-2), *args[1:])

    def _factor(self, parted: Tensor) -> Tensor:
        """xi of each text, (texts, 1 ..., units, 1)."""
        ones = torch.ones(len(parted), *[1] * (parted.dim() - 3), self.units.count, 1, device=parted.device)
        return (ones if self.gate is None else ones * self.gate.open[:, None]).requires_grad_()

    def collect(self) -> None:
        """After a backward pass of a mean over texts: add what the factors tell, and forget them."""
        gradients = [factor.grad for factor in self.factors if factor.grad is not None]
        self.factors = []
        if gradients:
            each = torch.stack(gradients).sum(0).flatten(1).double() * len(gradients[0])  # (texts, units)
            self._add(each.abs())

    def _add_activation(self, parted: Tensor) -> None:
        """`parted`: (texts, tokens, units, columns)."""
        each = parted.abs().double().mean(-1)
        text = None if self.batch is None else text_of(self.batch, self.decoder)
        if text is not None and text.shape == each.shape[:-1]:
            each = each[text]
        self._add(each.flatten(0, -2))

    def _add(self, rows: Tensor) -> None:
        self._sums = self._sums.to(rows.device) + rows.sum(0)
        self._count += len(rows)

    def take(self) -> tuple[Tensor, int]:
        """The sums, (units,), and of how many; they start again from nothing."""
        taken = self._sums, self._count
        self._sums, self._count = torch.zeros_like(self._sums), 0
        return taken


def measure(
    model: nn.Module, all_units: Sequence[Units], kind: Importance, rows: int, context: Context
) -> list[Tensor]:
    """The importance of the units of each sublayer, each (units,). The model is left as it was."""
    if kind == "magnitude":
        return [magnitude(model, units) for units in all_units]
    meters = [Meter(units, kind) for units in all_units]
    for meter, units in zip(meters, all_units, strict=True):
        meter.decoder = in_decoder(context.anatomy, units.output)
    hooks = [
        model.get_submodule(units.output).register_forward_pre_hook(meter)
        for units, meter in zip(all_units, meters, strict=True)
    ]
    return gathered(model, meters, hooks, rows, context)


def measure_channels(model: nn.Module, stream: Stream, kind: Importance, rows: int, context: Context) -> Tensor:
    """The importance of the channels of the residual stream, (width,): the l2 norm of all weights at it, or what the
    norms in it give, which have one xi between them. The model is left as it was."""
    if kind == "magnitude":
        with torch.no_grad():
            squares = [tensor.square().transpose(0, dim).flatten(1).sum(1) if tensor.dim() > 1 else tensor.square()
                       for tensor, dim in stream.slices(model)]  # fmt: skip
            return torch.stack(squares).sum(0).sqrt()
    meter = Meter(Channels(stream.width), kind)

    def look(name: str) -> Any:
        decoder = in_decoder(context.anatomy, name)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
            meter.decoder = decoder
            return meter(module, (output,))[0] if output.dim() == 3 else None  # and no table of positions

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(look(name)) for name in stream.norms]
    return gathered(model, [meter], hooks, rows, context)[0]


@dataclass(frozen=True)
class Channels:
    """Parts of one column each."""

    count: int
    columns: int = 1


def gathered(
    model: nn.Module, meters: Sequence[Meter], hooks: Sequence[Any], rows: int, context: Context
) -> list[Tensor]:
    """What the meters tell of calibration rows, a mean, each (units,). The hooks are taken off."""
    was_training = model.training
    model.eval()
    try:
        for batch in context.calibration(rows):
            see(model, batch, meters, context)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [sums / max(count, 1) for sums, count in (meter.take() for meter in meters)]


def see(model: nn.Module, batch: Mapping[str, Tensor], meters: Sequence[Meter], context: Context) -> None:
    """Let the meters see one batch."""
    gradients = meters[0].kind == "taylor"
    for meter in meters:
        meter.batch = batch
    with torch.set_grad_enabled(gradients):
        loss = context.loss(model, batch)
    if gradients:
        loss.backward(inputs=[factor for meter in meters for factor in meter.factors])
    for meter in meters:
        meter.collect()
