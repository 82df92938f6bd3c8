"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): LoRA on a base that is frozen in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import PARTS, Anatomy
from niwaki.stage import Context, Effects, Stage, Tuning
from niwaki.tuning.lora import LoRA

if TYPE_CHECKING:
    from niwaki.tuning.normal_float import UseNormalFloat


@dataclass(frozen=True, kw_only=True)
class QLoRA(Tuning):
    """y = dequantize(codes) x + (alpha / rank) B A x: every linear of the blocks in NormalFloat of 4 bits, with a scale
    for each `block` of weights, and LoRA's fields above.

    `double_quantization` stores the scales in 8 bits (4.13 bits a weight instead of 4.5). `merge=false` saves the
    codes and, beside them, the adapter. `merge=true` saves their sum in fp32, which lies on no grid of 4 bits: full
    size, the same function. For merged weights that are integers train through the grid instead: tuning=lora
    compression=quantize/qat compression.qat.bits=4, whose base is in fp32 while it trains.
    """

    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv:2305.14314"
    trains_base: ClassVar[bool] = False

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    parts: Sequence[str] = PARTS
    block: int = 64
    double_quantization: bool = True
    merge: bool = False

    def __post_init__(self) -> None:
        _ = self.lora  # which checks the fields that are its own
        if self.block < 2 or self.block % 2:
            raise ConfigError(f"tuning.block={self.block}: needs an even whole number of at least 2")

    @property
    def lora(self) -> LoRA:
        """The LoRA above the base."""
        return LoRA(
            rank=self.rank, alpha=self.alpha, dropout=self.dropout, rank_stabilized=self.rank_stabilized,
            parts=self.parts, merge=self.merge,
        )  # fmt: skip

    def conflict(self, others: Sequence[Stage]) -> str | None:
        weight = next((other for other in others if other.acts_on_linears), None)
        if weight is None:
            return None
        return (
            f"tuning=qlora and {weight.name}: the base is fixed in 4 bits, so the sum of base and adapter cannot be "
            "masked or rounded; use tuning=lora, whose delta is part of the weight there"
        )

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        self.lora.check(anatomy, targets)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        from niwaki.tuning.normal_float import quantize

        quantize(model, self._edit(context))
        for name in context.targets:  # or they would hold the dense weights
            context.targets[name] = model.get_submodule(name)  # type: ignore[assignment]
        return self.lora.prepare(model, context)

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        from niwaki.weights import to_dense

        if self.merge:
            to_dense(model)
            return self.lora.finalize(model, context)
        return [self._edit(context), *self.lora.finalize(model, context)]

    def _edit(self, context: Context) -> UseNormalFloat:
        from niwaki.tuning.normal_float import UseNormalFloat

        names = list(context.targets)
        return UseNormalFloat(modules=names, block=self.block, double_quantization=self.double_quantization)
