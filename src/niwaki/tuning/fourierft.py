"""FourierFT: a few coefficients of the update's spectrum (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from niwaki.errors import ConfigError
from niwaki.stage import Context
from niwaki.tuning.peft_tuning import PeftTuning, check_positive

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class FourierFT(PeftTuning):
    """W + scaling * Re(IDFT2(F)), with F (out, in) zero but for `frequencies` entries, at places that the seed draws
    and that all linears of one shape share. They start as zeros or, as in the paper, from a normal distribution.
    """

    paper: ClassVar[str] = "Gao et al. 2024, arXiv:2405.03003"

    frequencies: int = 500
    scaling: float = 150.0
    init: Literal["zero", "normal"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(frequencies=self.frequencies, scaling=self.scaling)
        if self.init not in ("zero", "normal"):
            raise ConfigError(f"tuning.init={self.init!r}: needs zero or normal")

    def check_linear(self, name: str, linear: nn.Linear) -> None:
        if self.frequencies > linear.in_features * linear.out_features:
            size = linear.in_features * linear.out_features
            raise ConfigError(
                f"tuning.frequencies={self.frequencies}: {name} has {size} entries; needs no more than that"
            )

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import FourierFTConfig

        return FourierFTConfig(
            n_frequency=self.frequencies,
            scaling=self.scaling,
            random_loc_seed=context.seed,
            init_weights=self.init == "zero",
            target_modules=names,
        )
