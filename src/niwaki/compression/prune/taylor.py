"""First-order Taylor pruning: gradient x weight, on calibration rows (SNIP, Lee et al. 2019, arXiv:1810.02340) or
gathered along the fit (Molchanov et al. 2019, arXiv:1906.10771)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from niwaki.compression.calibration import evaluating, to_device
from niwaki.compression.prune.calibration import When, check_calibration, out_of_order
from niwaki.compression.prune.mask import Mask
from niwaki.compression.prune.pruning import given
from niwaki.compression.prune.scheduled import Masks, Scheduled
from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects, Stage
from niwaki.weights import entering


class TaylorMask(Mask):
    """A mask that gathers |gradient x weight|, of masked weights too, from each backward pass between two draws. The
    gradients of a weight that is used several times are summed up first."""

    gathered: Tensor

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__(shape, device)
        self.register_buffer("gathered", torch.zeros(shape, device=device))
        self.watcher = self.see
        self._seen: Tensor | None = None  # gradient x weight, of the uses in this backward pass

    def see(self, gradient: Tensor, weight: Tensor) -> None:
        """One use of the weight in a backward pass."""
        product = gradient * weight
        self._seen = product if self._seen is None else self._seen + product

    def gather(self, rows: int) -> None:
        """Add the backward pass of a mean over so many rows; a gradient that a loss scale made infinite counts
        nothing."""
        if self._seen is not None:
            self.gathered += rows * self._seen.abs().nan_to_num(0.0, 0.0, 0.0)
        self._seen = None

    def take(self, kept: Tensor) -> None:
        super().take(kept)
        self.gathered.zero_()


class Gather(pl.Callback):
    """Lets the masks gather each backward pass of a fit."""

    def __init__(self, masks: Sequence[TaylorMask]) -> None:
        self.masks = list(masks)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        for mask in self.masks:
            mask.gather(rows_of(batch))


def rows_of(batch: Mapping[str, Any]) -> int:
    """How many rows a batch has."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


@dataclass(frozen=True, kw_only=True)
class Taylor(Scheduled):
    """Keep the weights whose loss would be felt most, to first order: |dL/dw * w|.

    `schedule=one_shot` (SNIP) and the start of `rigl`: the gradient is that of the sum of the task's losses on
    calibration rows, in eval mode. `cubic` and `rewind`: |dL/dw * w| of each backward pass of the fit, summed up since
    the last mask was drawn, each times the rows of its batch; L is the loss of the fit, and dL/dw that of the masked
    weight, so that a weight that went can come back (with cubic).
    """

    paper: ClassVar[str] = "Lee et al. 2019, arXiv:1810.02340; Molchanov et al. 2019, arXiv:1906.10771"

    rows: int | None = None
    when: When | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None and self.along_the_fit:
            raise ConfigError(
                f"{self.field}.rows: has no effect with schedule={self.schedule}, which takes the gradients of the fit"
            )
        if self.when is not None and self.schedule != "one_shot":
            raise ConfigError(f"{self.field}.when: has no effect with schedule={self.schedule}; use schedule=one_shot")
        check_calibration(given(self.rows, 128), given(self.when, "before_fit"), self.field)

    @property
    def along_the_fit(self) -> bool:
        """Whether gradients of the fit are gathered."""
        return self.schedule in ("cubic", "rewind")

    @property
    def kind(self) -> type[Mask]:  # type: ignore[override]
        return TaylorMask if self.along_the_fit else Mask

    @property
    def during_fit(self) -> bool:  # type: ignore[override]
        return self.when != "after_fit"

    def conflict(self, others: Sequence[Stage]) -> str | None:
        return out_of_order(self, others) or super().conflict(others)

    def score(self, weight: Tensor, mask: Any) -> Tensor:
        gathered: Tensor = mask.gathered
        return gathered

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        effects = super().prepare(model, context)
        if self.along_the_fit:  # first, since a mask may be drawn at the end of the same step
            effects.callbacks.insert(0, Gather([m for m in model.modules() if isinstance(m, TaylorMask)]))
        return effects

    def first_scores(self, model: nn.Module, masks: Masks, context: Context) -> dict[Any, Tensor]:
        gradients = {mask: torch.zeros_like(mask.mask, dtype=torch.float32) for _, mask in masks.values()}
        for mask in gradients:
            mask.watcher = lambda gradient, weight, into=gradients[mask]: into.add_(gradient)
        device = next(model.parameters()).device
        with evaluating(model), torch.enable_grad():
            for batch in context.calibration(given(self.rows, 128)):
                (rows_of(batch) * context.loss(model, to_device(batch, device))).backward()
        model.zero_grad(set_to_none=True)
        for mask in gradients:
            mask.watcher = None
        return {mask: (gradients[mask] * entering(linear, mask)).abs() for linear, mask in masks.values()}
