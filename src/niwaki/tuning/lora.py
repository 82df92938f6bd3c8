"""LoRA (Hu et al. 2021, arXiv:2106.09685), with rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Context, Effects, Stage, Tuning
from niwaki.tuning import beside

PARTS = ("query", "key", "value", "output", "feed_in", "feed_gate", "feed_out")


@dataclass(frozen=True, kw_only=True)
class LoRA(Tuning):
    """W + (alpha / rank) B A, with A (rank, in) random and B (out, rank) zero at the start; W is frozen.

    `rank_stabilized` divides alpha by sqrt(rank) instead. `parts` names the linears of a block that get an adapter.
    Under weight compression the delta is the first link of the chain, so the sum is what is masked and rounded.
    `merge=false` saves the base as it was and, beside it, the adapter and the head that learned.
    """

    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    parts: Sequence[str] = PARTS
    merge: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"tuning.rank={self.rank}: needs a whole number of at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"tuning.alpha={self.alpha}: needs a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"tuning.dropout={self.dropout}: needs a number in 0..1, below 1")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"tuning.parts={list(self.parts)}: needs some of {', '.join(PARTS)}")

    def conflict(self, others: Sequence[Stage]) -> str | None:
        weight = next((o for o in others if o.phase.acts_on_weights and o.during_fit), None)
        if self.dropout and weight:
            return (
                f"tuning=lora with tuning.dropout={self.dropout} and {weight.name}: the delta is part of the weight "
                "there, and a dropout of its input has no effect; set tuning.dropout=0"
            )
        return None if self.merge else beside.conflict(self.name, others)

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        if not self._names(anatomy):
            raise ConfigError(f"tuning.parts={list(self.parts)}: this family of models has none of them")

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        from peft import LoraConfig

        from niwaki.tuning.delta import inject

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            target_modules=self._names(context.anatomy),
        )
        head = list(context.anatomy.head_parameters().values()) if context.head_learns else []
        inject(model, config)
        for parameter in head:
            parameter.requires_grad_(True)
        if not self.merge:
            beside.remember(model, context)
        return Effects()

    def link(self, model: nn.Module, context: Context) -> None:
        from niwaki.tuning import delta

        delta.link(model, context.targets)

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        from niwaki.tuning.delta import unload

        if not self.merge:
            return beside.leave(model, context)
        unload(model)
        return []

    def _names(self, anatomy: Anatomy) -> list[str]:
        wanted = {getattr(anatomy.family, part) for part in self.parts} - {None}
        blocks = f"{anatomy.prefix}{anatomy.family.blocks}."
        return [n for n in anatomy.linears() if n.removeprefix(blocks).partition(".")[2] in wanted]
