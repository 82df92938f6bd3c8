"""What the tunings have in common that PEFT has, and that change the weights of linears."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import PARTS, Anatomy
from niwaki.stage import Context, Effects, Stage, Tuning
from niwaki.tuning import beside

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

ADAPTER = "default"  # the name that PEFT knows the adapter by


@dataclass(frozen=True, kw_only=True)
class PeftTuning(Tuning):
    """Adapters of PEFT on the linears of the blocks that `parts` names; the base weights are frozen, a new head learns.
    A linear that plays several parts (GPT-2 and ModernBERT fuse query, key and value) is taken whole for any of them.

    Under weight compression the merge is the first link of the chain, so the merged weight is what is masked and
    rounded; alone, PEFT's own forward is used. `merge=false` saves the base as it was and, beside it, the adapter and
    the head that learned.
    """

    trains_base: ClassVar[bool] = False

    parts: Sequence[str] = PARTS
    merge: bool = True

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"tuning.parts={list(self.parts)}: needs some of {', '.join(PARTS)}")
        if not 0 <= self._dropout < 1:
            raise ConfigError(f"tuning.dropout={self._dropout}: needs a number in 0..1, below 1")

    @abc.abstractmethod
    def config(self, names: list[str], context: Context) -> PeftConfig:
        """PEFT's settings of this method, for the linears of these names."""

    def merged(self, layer: Any, weight: Tensor) -> Tensor:
        """What PEFT's merge makes of the base weight of an adapter layer, both (out, in)."""
        from niwaki.tuning.delta import plus_delta

        return plus_delta(layer, weight)

    def check_linear(self, name: str, linear: nn.Linear) -> None:
        """Raise ConfigError where a linear does not have the shape for this method."""
        return None

    def conflict(self, others: Sequence[Stage]) -> str | None:
        weight = next((o for o in others if o.acts_on_linears and o.during_fit), None)
        if self._dropout and weight:
            return (
                f"tuning={self.name} with tuning.dropout={self._dropout} and {weight.name}: the delta is part of the "
                "weight there, and a dropout of its input has no effect; set tuning.dropout=0"
            )
        return None if self.merge else beside.conflict(self.name, others)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        names = anatomy.part_names(self.parts)
        if not names:
            raise ConfigError(f"tuning.parts={list(self.parts)}: this family of models has none of them")
        linears = anatomy.linears()
        for name in names:
            self.check_linear(name, linears[name])

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        self.inject(model, context)
        return Effects()

    def inject(self, model: nn.Module, context: Context) -> BaseTuner:
        """Put the adapters in; they learn, and the head where it is new. Returns PEFT's tuner."""
        from niwaki.tuning import delta

        head = context.new_head
        tuner = delta.inject(model, self.config(context.anatomy.part_names(self.parts), context))
        for parameter in head:
            parameter.requires_grad_(True)
        if not self.merge:
            beside.refuse_tied_head(model, context)
            beside.remember(model, context)
        return tuner

    def link(self, model: nn.Module, context: Context) -> None:
        from niwaki.tuning import delta

        delta.link(model, context.targets, self.merged)

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        from niwaki.tuning.delta import unload

        if not self.merge:
            return beside.leave(model, context)
        unload(model)
        return []

    @property
    def _dropout(self) -> float:
        """Of the input of the adapters; 0 for the methods that have none."""
        value: float = getattr(self, "dropout", 0.0)
        return value


def check_positive(**fields: float) -> None:
    """Raise ConfigError, naming the field, for a number that is not above 0."""
    for field, value in fields.items():
        if not value > 0:
            need = "a whole number of at least 1" if isinstance(value, int) and field != "alpha" else "a number above 0"
            raise ConfigError(f"tuning.{field}={value}: needs {need}")
