"""LoRA (Hu et al. 2021, arXiv:2106.09685), with rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732), two
learning rates (LoRA+, Hayou et al. 2024, arXiv:2402.12354), and starts from the weight itself: PiSSA (Meng et al. 2024,
arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from niwaki.errors import ConfigError
from niwaki.stage import Context, Effects
from niwaki.tuning.peft_tuning import PeftTuning, check_positive

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class LoRA(PeftTuning):
    """W + (alpha / rank) B A, with A (rank, in) random and B (out, rank) zero at the start; W is frozen.

    `rank_stabilized` divides alpha by sqrt(rank) instead. `lr_ratio`: learning rate of B over that of A (LoRA+).
    `init=pissa`: B A are the `rank` largest singular values of W with their vectors, `init=olora`: the first columns
    and rows of its QR decomposition; either way W keeps the rest, so that the sum is W at the start.
    """

    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilized: bool = False
    init: Literal["default", "pissa", "olora"] = "default"
    lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(rank=self.rank, alpha=self.alpha, lr_ratio=self.lr_ratio)
        if self.init not in ("default", "pissa", "olora"):
            raise ConfigError(f"tuning.init={self.init!r}: needs default, pissa or olora")
        if self.init != "default" and not self.merge:
            raise ConfigError(
                f"tuning.init={self.init}: takes its start out of the base, which would not be as it was; needs "
                "tuning.merge=true"
            )

    def check_linear(self, name: str, linear: nn.Linear) -> None:
        full = min(linear.in_features, linear.out_features)
        if self.init != "default" and self.rank > full:
            raise ConfigError(f"tuning.rank={self.rank}: {name} has rank {full}; init={self.init} needs no more")

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            init_lora_weights=True if self.init == "default" else self.init,
            target_modules=names,
        )

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        self.inject(model, context)
        if self.lr_ratio == 1:
            return Effects()
        return Effects(lr_factors={name: self.lr_ratio for name, _ in model.named_parameters() if ".lora_B." in name})
