"""Wanda: pruning by weights and activations (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from niwaki.compression.prune.calibration import Calibrated
from niwaki.compression.prune.pattern import Pattern, Scope
from niwaki.weights import entering


@dataclass(frozen=True, kw_only=True)
class Wanda(Calibrated):
    """S_ij = |W_ij| * ||X_j||_2 with the inputs X (tokens, in) of the linear; the lowest of each row (output) go.

    `scope`: row, as in the paper, or layer: the lowest of the whole linear; null for row where the pattern has rows.
    """

    paper: ClassVar[str] = "Sun et al. 2023, arXiv:2306.11695"

    scope: Literal["row", "layer"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope is not None:
            self.check_scope(self.scope, ("row", "layer"))

    @property
    def compared(self) -> Scope:
        pattern = Pattern.parse(self.pattern)
        return self.scope or ("row" if pattern.height == 1 and not pattern.group else "layer")

    def statistic(self, values: Tensor) -> Tensor:
        return values.square().sum(0)

    def prune(self, linear: nn.Linear, mask: Any, statistic: Tensor, sparsity: float) -> None:
        scores = entering(linear, mask).abs() * statistic.sqrt()
        mask.take(Pattern.parse(self.pattern).draw(scores, sparsity, by_row=self.compared == "row"))
