"""Pruning that looks at what enters the linears: calibration rows, block by block, each block fed by pruned ones."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from niwaki.compression.prune.pruning import Pruning
from niwaki.errors import ConfigError
from niwaki.model.text import in_decoder, text_of
from niwaki.stage import Context, Effects, Stage

When = Literal["before_fit", "after_fit"]
Gather = Callable[[str, Tensor], None]
"""(name of a linear, what enters it: (tokens, inputs))."""


class Enough(Exception):
    """The blocks that are looked at have been passed."""


def check_calibration(rows: int, when: str, field: str) -> None:
    """Raise ConfigError for no rows, or an unknown moment."""
    if rows < 1:
        raise ConfigError(f"{field}.rows={rows}: needs a whole number of at least 1; there is nothing else to look at")
    if when not in ("before_fit", "after_fit"):
        raise ConfigError(f"{field}.when={when!r}: needs before_fit or after_fit")


def out_of_order(stage: Stage, others: Sequence[Stage]) -> str | None:
    """Why a method that acts after the fit cannot go below one that the fit runs through, or None."""
    above = next((o for o in others if o.phase.acts_on_weights and o.phase > stage.phase and o.during_fit), None)
    if stage.during_fit or above is None:
        return None
    field = f"compression.{stage.name.rpartition('/')[2]}"
    return (
        f"{stage.name} after the fit and {above.name}: the fit runs through {above.name} already, which comes after "
        f"pruning; set {field}.when=before_fit"
    )


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch where the model is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """(..., inputs) -> (tokens, inputs) without padding: positions whose attention mask (rows, length) is 0. Longer
    rows begin with virtual tokens, which all count; what has another shape (tables of positions) counts whole."""
    extra = values.shape[1] - mask.shape[1] if mask is not None and values.ndim == 3 else -1
    if mask is None or extra < 0 or len(values) != len(mask):
        return values.reshape(-1, values.shape[-1])
    virtual = mask.new_ones(len(mask), extra)
    return values[torch.cat([virtual, mask], 1).bool()]


def watch_inputs(
    model: nn.Module, context: Context, batches: Sequence[Mapping[str, Tensor]], linears: Mapping[str, nn.Linear],
    gather: Gather, stop: nn.Module | None,
) -> None:  # fmt: skip
    """Run the batches, and show what enters `linears` to `gather`, until `stop` is entered."""
    masks: dict[bool, Tensor] = {}

    def show(name: str) -> Any:
        decoder = in_decoder(context.anatomy, name)
        return lambda module, inputs: gather(name, tokens(inputs[0].detach(), masks[decoder]))

    def leave(module: nn.Module, inputs: Any) -> None:
        raise Enough

    handles = [linear.register_forward_pre_hook(show(name)) for name, linear in linears.items()]
    handles += [stop.register_forward_pre_hook(leave)] if stop is not None else []
    device = next(model.parameters()).device
    try:
        for batch in batches:
            moved = to_device(batch, device)
            masks |= {decoder: text_of(moved, decoder) for decoder in (False, True)}
            with suppress(Enough):
                model(**context.inputs(moved))
    finally:
        for handle in handles:
            handle.remove()


def entered(
    model: nn.Module, context: Context, batch: Mapping[str, Tensor], blocks: Sequence[nn.Module]
) -> list[nn.Module]:  # fmt: skip
    """These blocks in the order in which a batch enters them; one that is used several times stands there as often."""
    found: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any) -> None:
        found.append(module)

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        model(**context.inputs(to_device(batch, next(model.parameters()).device)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def after_last_use(block: nn.Module, order: Sequence[nn.Module]) -> nn.Module | None:
    """The first block that is new when this one has been used for the last time; None where there is none."""
    last = max((place for place, used in enumerate(order) if used is block), default=len(order))
    return next((later for later in order[last + 1 :] if later not in order[: last + 1]), None)


@dataclass(frozen=True, kw_only=True)
class Calibrated(Pruning):
    """Statistics of what enters each linear, from `rows` rows of the training split, in eval mode. Block after block
    is looked at and pruned, so that later ones see what the pruned ones before them give, as in the authors' code; for
    that, each block costs a pass of the rows through those below it. One that is used several times is looked at once,
    in all of its uses.

    `when`: before_fit, which then trains through the masks, or after_fit.
    """

    rows: int = 128
    when: When = "before_fit"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_calibration(self.rows, self.when, self.field)

    @property
    def during_fit(self) -> bool:  # type: ignore[override]
        return self.when == "before_fit"

    def conflict(self, others: Sequence[Stage]) -> str | None:
        return out_of_order(self, others) or super().conflict(others)

    @abc.abstractmethod
    def statistic(self, values: Tensor) -> Tensor:
        """What is summed up over batches, from what enters a linear: (tokens, inputs)."""

    @abc.abstractmethod
    def prune(self, linear: nn.Linear, mask: Any, statistic: Tensor, sparsity: float) -> None:
        """Set the mask of a linear from its statistic."""

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        masks = self.masks(context)
        sparsities = self.sparsities(masks)
        batches = context.calibration(self.rows)
        blocks = [(place, block) for place, _, block in context.anatomy.named_blocks()]
        looked_at = [(block, named) for place, block in blocks if (named := inside(place, masks))]
        with evaluating(model), torch.no_grad():
            order = entered(model, context, batches[0], [block for block, _ in looked_at])
            for block, names in looked_at:
                after = after_last_use(block, order)
                for name, statistic in self._statistics(model, context, batches, masks, names, after).items():
                    self.prune(*masks[name], statistic, sparsities[name])
        return Effects()

    def _statistics(
        self, model: nn.Module, context: Context, batches: Any, masks: Any, names: list[str], stop: nn.Module | None
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def gather(name: str, values: Tensor) -> None:
            part = self.statistic(values.float())
            found[name] = found[name] + part if name in found else part

        watch_inputs(model, context, batches, {name: masks[name][0] for name in names}, gather, stop)
        silent = [name for name in names if name not in found]
        if silent:
            raise ConfigError(f"{self.field}: nothing enters {silent[0]} when the model runs; leave it out by targets")
        return found


def inside(place: str, names: Mapping[str, Any]) -> list[str]:
    """Those of `names` that lie in a block."""
    return [name for name in names if name.startswith(f"{place}.")]
