"""The masks of CoFi: one for each head or neuron and one for each whole sublayer, and what holds them to a size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.prune.hard_concrete import open_probability, sample, settled
from niwaki.compression.prune.stream_mask import OPEN, SPREAD, STREAM_MASK, StreamMask
from niwaki.model.units import Units
from niwaki.weights import replace_module

SUFFIX = "_mask"  # behind the name of the linear that reads the units
MULTIPLIERS = "cofi_multipliers"  # child of the model, during the fit


class SublayerMask(nn.Module):
    """z_layer * z_unit for each unit of a sublayer, before the linear that reads them.

    While it learns, z is drawn anew for each batch; in eval mode it is the mask of as many zeros as are expected, and
    after `settle` the one that was chosen, for good. Without `whole` there is no z_layer, and one unit always stays;
    without `each`, no z_unit, and the units go together.
    """

    open: Tensor
    is_settled: Tensor

    def __init__(self, units: Units, size: int, *, whole: bool, each: bool, device: Any) -> None:
        super().__init__()
        self.units = units
        self.size = size  # weights that a unit owns
        self.layer = nn.Parameter(torch.full((1,), OPEN, device=device)) if whole else None
        self.unit = nn.Parameter(torch.zeros(units.count, device=device)) if each else None
        self.register_buffer("open", torch.ones(units.count, device=device))
        self.register_buffer("is_settled", torch.zeros((), dtype=torch.bool, device=device))
        self.hook: Any = None
        self._uniform: dict[str, Tensor] = {}

    def forward(self, values: Tensor) -> Tensor:
        parted = values.unflatten(-1, (self.units.count, self.units.columns))
        return (parted * self.factors().to(values.dtype)[:, None]).flatten(-2)

    def factors(self) -> Tensor:
        """z, (units,)."""
        if self.is_settled:
            return self.open
        if not self.training:
            return self.expected()
        parts = {"layer": self.layer, "unit": self.unit}
        z = self.open
        for name, log_alpha in parts.items():
            if log_alpha is not None:
                if name not in self._uniform:
                    self._uniform[name] = torch.rand_like(log_alpha)
                z = z * sample(log_alpha, self._uniform[name])
        return z

    def forget(self) -> None:
        """Draw anew from here on."""
        self._uniform = {}

    def probability(self) -> Tensor:
        """Of each unit, that its z is not zero: (units,)."""
        found = torch.ones_like(self.open)
        for log_alpha in (self.layer, self.unit):
            if log_alpha is not None:
                found = found * open_probability(log_alpha)
        return found

    @torch.no_grad()
    def expected(self) -> Tensor:
        """The mask that would be kept now."""
        mask = torch.ones_like(self.open) if self.unit is None else settled(self.unit).to(self.open)
        if self.layer is not None:
            return mask * settled(self.layer).to(self.open)
        if not mask.any():
            assert self.unit is not None
            mask[self.unit.argmax()] = 1
        return mask

    @torch.no_grad()
    def ranks(self) -> Tensor:
        """The order in which units close, lowest first: those that are expected to be closed, then the others, both by
        the probability that z is not zero. (units,), or (1,) where they go together; infinite for one that stays."""
        ranks = self.expected() + self.probability()
        if self.layer is None:
            ranks[ranks.argmax()] = torch.inf
        return ranks if self.unit is not None else ranks[:1]

    def settle(self, stays: Tensor) -> None:
        """Keep these units, (units,) or (1,) for all of them, for good."""
        self.open.copy_(stays)
        self.is_settled.fill_(True)


def add_masks(model: nn.Module, found: Sequence[Units], choices: Sequence[str], seed: int) -> list[SublayerMask]:
    """A mask for each sublayer that `choices` names something of, drawn near its start."""
    generator, masks = torch.Generator().manual_seed(seed), []
    for units in found:
        whole = ("attention" if units.kind == "heads" else "feed_forward") in choices
        each = units.kind in choices
        if not whole and not each:
            continue
        linear: Any = model.get_submodule(units.output)
        mask = SublayerMask(units, owned(model, units), whole=whole, each=each, device=linear.weight.device)
        with torch.no_grad():
            for parameter in mask.parameters():
                parameter.add_(SPREAD * torch.randn(parameter.shape, generator=generator).to(parameter))
        replace_module(model, f"{units.end}{SUFFIX}", mask)
        masks.append(mask)
    return masks


def owned(model: nn.Module, units: Units) -> int:
    """The weights, without biases, that a unit owns: 4 d d_h for a head, 2 d for a neuron."""
    linears: Any = {name: model.get_submodule(name) for name in (*units.rows, units.output)}
    rows = sum(sum(widths) * linears[name].in_features for name, widths in units.rows.items())
    return int(rows + units.columns * linears[units.output].out_features)


def take_masks(model: nn.Module, masks: Sequence[SublayerMask]) -> dict[str, list[int]]:
    """Remove the masks; returns, by place of the sublayer, the units that stay."""
    kept = {}
    for mask in masks:
        kept[mask.units.place] = mask.open.nonzero().flatten().tolist()
        mask.hook.remove()
        parent, _, leaf = mask.units.end.rpartition(".")
        delattr(model.get_submodule(parent), f"{leaf}{SUFFIX}")
    return kept


class Ascend(torch.autograd.Function):
    """x -> x; the gradient changes its sign, so an optimizer that descends climbs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Multipliers(nn.Module):
    """lambda_1 and lambda_2, which the optimizer drives up where the masks are off their target; zero at the start."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, device=device))
        self.second = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, distance: Tensor) -> Tensor:
        first, second = Ascend.apply(self.first), Ascend.apply(self.second)
        value: Tensor = (first * distance + second * distance**2).squeeze()
        return value


@dataclass(frozen=True)
class Masks:
    """Those of the sublayers, and of the stream where it is masked."""

    sublayers: Sequence[SublayerMask]
    stream: StreamMask | None = None

    @property
    def each(self) -> list[SublayerMask | StreamMask]:
        return [*self.sublayers, *([self.stream] if self.stream else [])]

    @property
    def settled(self) -> bool:
        return bool(self.each[0].is_settled)

    def expected_sparsity(self) -> Tensor:
        """1 - sum of P(z_layer != 0) P(z_unit != 0) P(z_channel != 0) over the weights, by all (section 3.2)."""
        size = sum((mask.probability() * mask.size).sum() for mask in self.sublayers)
        share = 1.0 if self.stream is None else self.stream.probability().mean()
        return 1 - torch.as_tensor(size * share) / self._whole

    @torch.no_grad()
    def settle(self, target: float) -> None:
        """Keep masks for good, of a real sparsity as near to the target as whole units and channels allow: one by one
        they close in the order of their ranks, those first that are expected to be closed."""
        ranks = [mask.ranks().double() for mask in self.each]
        order = torch.cat(ranks).argsort(stable=True)
        order = order[: int(torch.cat(ranks).isfinite().sum())]  # what always stays is last
        closed = int((self._sparsities(ranks, order) - target).abs().argmin())
        stays = torch.ones(sum(map(len, ranks)), dtype=torch.bool, device=order.device)
        stays[order[:closed]] = False
        for mask, its in zip(self.each, stays.split([len(r) for r in ranks]), strict=True):
            mask.settle(its)

    def _sparsities(self, ranks: Sequence[Tensor], order: Tensor) -> Tensor:
        """The real sparsity when the first 0, 1, 2 ... of this order are closed."""
        sizes = [
            torch.full_like(r, m.size * m.units.count / len(r)) for m, r in zip(self.sublayers, ranks, strict=False)
        ]
        channels = [torch.zeros_like(part) for part in sizes]
        if self.stream is not None:
            sizes.append(torch.zeros_like(ranks[-1]))
            channels.append(torch.full_like(ranks[-1], 1 / len(ranks[-1])))
        gone, share = (torch.cat(parts)[order].cumsum(0) for parts in (sizes, channels))
        left = (self._whole - gone) * (1 - share) / self._whole
        return 1 - torch.cat([left.new_ones(1), left])

    def real_sparsity(self) -> float:
        """The same of the masks that are kept."""
        size = sum(float(mask.open.sum()) * mask.size for mask in self.sublayers)
        share = 1.0 if self.stream is None else float(self.stream.open.mean())
        return 1 - size * share / self._whole

    @property
    def _whole(self) -> int:
        return sum(mask.size * mask.units.count for mask in self.sublayers)


def masks_of(model: nn.Module) -> Masks:
    """Every mask of the model, in the order in which data flows."""
    sublayers = [module for module in model.modules() if isinstance(module, SublayerMask)]
    return Masks(sublayers, getattr(model, STREAM_MASK, None))


class SizePenalty:
    """The loss term: lambda_1 (s - t) + lambda_2 (s - t)^2, s the expected sparsity of what is masked, t its target,
    which grows linearly from 0 during the first `warmup` steps."""

    def __init__(self, masks: Masks, multipliers: Multipliers, target: float, warmup: int) -> None:
        self.masks = masks
        self.multipliers = multipliers
        self.target = target
        self.warmup = warmup
        self.step = 0

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if self.masks.settled:
            return self.masks.each[0].open.new_zeros(())
        return self.multipliers(self.masks.expected_sparsity() - self.target_at(self.step))

    def target_at(self, step: int) -> float:
        """t at an optimizer step."""
        return self.target * min(1.0, step / max(self.warmup, 1))


class CoFiSchedule(pl.Callback):
    """Puts the masks to work when the fit begins, and settles them at `last_step` at the target of the penalty."""

    def __init__(self, model: nn.Module, penalty: SizePenalty, last_step: int) -> None:
        self.model = model
        self.penalty = penalty
        self.learning = [*penalty.masks.each, penalty.multipliers]
        self.last_step = last_step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Only now: a tuning that came later froze what is not its own, and may have put something around the linear.
        for module in self.learning:
            module.requires_grad_(True)
        for mask in self.penalty.masks.sublayers:
            if mask.hook is None:
                outermost = self.model.get_submodule(mask.units.end)
                mask.hook = outermost.register_forward_pre_hook(masked(mask), prepend=True)
        if self.penalty.masks.stream is not None:
            self.penalty.masks.stream.put_to_work(self.model)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.penalty.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for mask in self.penalty.masks.each:
            mask.forget()
        if trainer.global_step >= self.last_step and not self.penalty.masks.settled:
            self.penalty.masks.settle(self.penalty.target)


def masked(mask: SublayerMask) -> Any:
    """A forward pre-hook that masks the input."""
    return lambda module, args: (mask(args[0]), *args[1:])


def last_step(end: float, steps: int) -> int:
    """The step at which masks settle, at least one and at most the last."""
    return min(max(math.ceil(end * steps), 1), steps)
