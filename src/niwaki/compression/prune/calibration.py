"""Pruning that looks at what enters the linears: calibration rows, block by block, each block fed by pruned ones."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from niwaki.compression.calibration import block_by_block, check_rows
from niwaki.compression.prune.pruning import Pruning
from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects, Stage

When = Literal["before_fit", "after_fit"]


def check_calibration(rows: int, when: str, field: str) -> None:
    """Raise ConfigError for no rows, or an unknown moment."""
    check_rows(rows, field)
    if when not in ("before_fit", "after_fit"):
        raise ConfigError(f"{field}.when={when!r}: needs before_fit or after_fit")


def out_of_order(stage: Stage, others: Sequence[Stage]) -> str | None:
    """Why a method that acts after the fit cannot go below one that the fit runs through, or None."""
    above = next((o for o in others if o.acts_on_linears and o.phase > stage.phase and o.during_fit), None)
    if stage.during_fit or above is None:
        return None
    field = f"compression.{stage.name.rpartition('/')[2]}"
    return (
        f"{stage.name} after the fit and {above.name}: the fit runs through {above.name} already, which comes after "
        f"pruning; set {field}.when=before_fit"
    )


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

        def prune(found: dict[str, Tensor]) -> None:
            for name, statistic in found.items():
                self.prune(*masks[name], statistic, sparsities[name])

        linears = {name: linear for name, (linear, _) in masks.items()}
        block_by_block(model, context, self.rows, linears, self.statistic, prune, self.field)
        return Effects()
