"""What the bottleneck adapters have in common: how they grow, start and learn."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Phase, Stage, Tuning
from niwaki.tuning import beside, bottleneck_folder
from niwaki.tuning.bottleneck import (
    ACTIVATIONS,
    NORMS,
    AddBottlenecks,
    Reads,
    bottlenecks,
    check_size,
    draw,
    edits_of,
    free_name,
    width_of,
)
from niwaki.tuning.freeze import train_only


@dataclass(frozen=True, kw_only=True)
class BottleneckTuning(Tuning):
    """Freeze the model; train bottlenecks between its layers, and the head where it is new.

    `size`: of a bottleneck, m; or `reduction`: the model's width divided by it. `norms`: the norms of the blocks learn
    too. `init_std`: standard deviation of the up-projections at the start; with 0 the model starts exactly as the base.
    `dropout`: of a bottleneck's activations. The bottlenecks stay in the saved model as layers; `merge=false` saves the
    base as it was and, beside it, the bottlenecks with the head and the norms that learned.
    """

    down_std: ClassVar[float | None]
    trains_base: ClassVar[bool] = False

    size: int | None
    reduction: int | None = None
    activation: str
    norms: bool = False
    init_std: float
    dropout: float = 0.0
    merge: bool = True

    def __post_init__(self) -> None:
        check_size(self.size, self.reduction)
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"tuning.activation={self.activation!r}: needs one of {', '.join(ACTIVATIONS)}")
        if self.init_std < 0:
            raise ConfigError(f"tuning.init_std={self.init_std}: needs a number of at least 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"tuning.dropout={self.dropout}: needs a number in 0..1, below 1")

    @property
    @abc.abstractmethod
    def parts(self) -> list[str]:
        """Where the sublayers end that get a bottleneck."""

    @abc.abstractmethod
    def reads(self, anatomy: Anatomy) -> Reads:
        """What a bottleneck reads."""

    @property
    def factor(self) -> float:
        """What the output of a bottleneck is multiplied by."""
        return 1.0

    def conflict(self, others: Sequence[Stage]) -> str | None:
        ranked = next((o for o in others if o.phase is Phase.PRUNE and getattr(o, "scope", None) == "global"), None)
        if ranked is None:
            return None if self.merge else beside.conflict(self.name, others)
        return (
            f"tuning={self.name} and {ranked.name} with scope=global: bottlenecks start near zero, so a ranking over "
            "all layers would drop them whole; use scope=layer"
        )

    def width(self, anatomy: Anatomy) -> int:
        """m, the size of a bottleneck."""
        if self.size is not None:
            return self.size
        assert self.reduction
        size = width_of(anatomy) // self.reduction
        if not size:
            raise ConfigError(
                f"tuning.reduction={self.reduction}: needs at most the model's width, {width_of(anatomy)}"
            )
        return size

    def grow(self, model: nn.Module, anatomy: Anatomy) -> list[Edit]:
        if not self.merge and edits_of(model):
            raise ConfigError(
                "tuning.merge=false: the model has bottlenecks of an earlier tuning; start from the one below them, or "
                "set tuning.merge=true"
            )
        edit = AddBottlenecks(
            adapter=free_name(model), parts=self.parts, reads=self.reads(anatomy), size=self.width(anatomy),
            activation=self.activation, scale=self.factor, dropout=self.dropout,
        )  # fmt: skip
        edit.apply(model)
        return [edit] if self.merge else []

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        adapter = list(edits_of(model))[-1]  # the one that `grow` made
        draw(model, adapter, seed=context.seed, down_std=self.down_std, up_std=self.init_std)
        own = [p for bottleneck in bottlenecks(model, adapter).values() for p in bottleneck.parameters()]
        norms = block_norms(context.anatomy) if self.norms else ()
        head = context.new_head
        if not self.merge:
            beside.refuse_tied_head(model, context)
        train_only(model, [*own, *norms, *head])
        bottleneck_folder.remember(model, adapter)
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        if self.merge:
            return []
        base = bottleneck_folder.base_state(model, model.state_dict())
        heads = {name.rpartition(".")[0] for name in bottleneck_folder.shelf_of(model).base}
        return [beside.UseAdapter(folder=beside.FOLDER, base=beside.fingerprint(base, heads))]


def block_norms(anatomy: Anatomy) -> Iterable[nn.Parameter]:
    """Weights and biases of the norms of the blocks."""
    for part in (*NORMS.values(), "cross_norm"):
        for place in anatomy.places(part):
            yield from anatomy.model.get_submodule(place).parameters()
