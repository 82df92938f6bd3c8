"""Gates: a factor of 1 or 0 for each head or neuron before the linear that reads them, closed during a fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.prune.importance import Importance, Meter, magnitude
from niwaki.model.anatomy import Anatomy
from niwaki.model.text import in_decoder
from niwaki.model.units import Units
from niwaki.weights import replace_module

SUFFIX = "_gate"  # behind the name of the linear
Draw = Callable[[Sequence[Tensor], float], list[Tensor]]
"""(importance in each sublayer, the fraction gone of what goes) -> in each sublayer, what stays."""


class Gate(nn.Module):
    """Which units of a sublayer are open, and what was gathered of their importance since that was last set."""

    open: Tensor
    sums: Tensor
    count: Tensor

    def __init__(self, units: int, device: Any) -> None:
        super().__init__()
        self.register_buffer("open", torch.ones(units, device=device))
        self.register_buffer("sums", torch.zeros(units, dtype=torch.float64, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64, device=device))
        self.hook: Any = None  # what closes the units; a handle

    def gather(self, meter: Meter) -> None:
        """Take over what a meter gathered."""
        sums, count = meter.take()
        self.sums += sums.to(self.sums)
        self.count += count

    def set(self, stays: Tensor) -> None:
        """Open these units alone, and gather anew."""
        self.open.copy_(stays)
        self.sums.zero_()
        self.count.zero_()


def add_gates(model: nn.Module, found: Sequence[Units]) -> dict[Units, Gate]:
    """A gate, open, for each sublayer. It hangs beside the output linear, which a tuning may put something around."""
    gates = {}
    for units in found:
        device = next(model.get_submodule(units.end).parameters()).device
        gates[units] = Gate(units.count, device)
        replace_module(model, f"{units.end}{SUFFIX}", gates[units])
    return gates


def take_gates(model: nn.Module, found: Sequence[Units]) -> list[list[int]]:
    """Remove the gates; returns the units that were open, in each sublayer."""
    kept = []
    for units in found:
        parent, _, leaf = units.end.rpartition(".")
        gate: Any = model.get_submodule(f"{units.end}{SUFFIX}")
        kept.append(gate.open.nonzero().flatten().tolist())
        gate.hook.remove()
        delattr(model.get_submodule(parent), f"{leaf}{SUFFIX}")
    return kept


class GateSchedule(pl.Callback):
    """Sets the gates anew every `interval` optimizer steps until `last_step`, by the importance gathered since."""

    def __init__(
        self, model: nn.Module, gates: dict[Units, Gate], *, kind: Importance, draw: Draw,
        fraction_at: Callable[[int], float], last_step: int, interval: int,
    ) -> None:  # fmt: skip
        self.model = model
        self.gates = gates
        self.meters = {units: Meter(units, kind, gate) for units, gate in gates.items()}
        for units, meter in self.meters.items():
            meter.decoder = in_decoder(Anatomy.of(model), units.output)
        self.kind = kind
        self.draw = draw
        self.fraction_at = fraction_at
        self.last_step = last_step
        self.interval = interval
        self._drawn = -1

    @property
    def state_key(self) -> str:
        """One for heads and one for neurons: both may be in a fit."""
        return f"gates of {next(iter(self.gates)).kind}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Only now, since a tuning that came later may have put something around the linear, which reads its input too;
        # and first of all hooks, since integers are rounded by what is left of the input.
        for units, gate in self.gates.items():
            if gate.hook is None:
                outermost = self.model.get_submodule(units.end)
                gate.hook = outermost.register_forward_pre_hook(self.meters[units], prepend=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        for meter in self.meters.values():
            meter.gathers = trainer.global_step < self.last_step
            meter.batch = batch

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for units, meter in self.meters.items():
            meter.collect()
            meter.gathers, meter.batch = False, None
            self.gates[units].gather(meter)
        step = trainer.global_step
        due = step % self.interval == 0 or step == self.last_step
        if due and self._drawn < step <= self.last_step:
            self._drawn = step
            self._set([self._importance(units, trainer) for units in self.gates], self.fraction_at(step))

    def _importance(self, units: Units, trainer: pl.Trainer) -> Tensor:
        if self.kind == "magnitude":
            return magnitude(self.model, units)
        gate = self.gates[units]
        sums, count = (trainer.strategy.reduce(value.clone(), reduce_op="sum") for value in (gate.sums, gate.count))
        return sums / count.clamp(min=1)

    def _set(self, scores: Sequence[Tensor], fraction: float) -> None:
        for gate, stays in zip(self.gates.values(), self.draw(scores, fraction), strict=True):
            gate.set(stays)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn = state_dict["drawn"]
