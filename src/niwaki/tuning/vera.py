"""VeRA: vectors that scale a pair of random matrices, one pair for all linears (Kopiczko et al. 2023,
arXiv:2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from niwaki.stage import Context
from niwaki.tuning.peft_tuning import PeftTuning, check_positive

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, kw_only=True)
class VeRA(PeftTuning):
    """W + diag(b) B diag(d) A, with A and B frozen and random, d (rank,) of `start` and b (out,) zero at the start.

    A and B have the size of the largest linear; a smaller one uses their first columns and rows.
    """

    paper: ClassVar[str] = "Kopiczko et al. 2023, arXiv:2310.11454"

    rank: int = 256
    start: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(rank=self.rank, start=self.start)

    def config(self, names: list[str], context: Context) -> PeftConfig:
        from peft import VeraConfig

        return VeraConfig(
            r=self.rank,
            d_initial=self.start,
            vera_dropout=self.dropout,
            projection_prng_key=context.seed,
            save_projection=True,  # into checkpoints: another machine may draw other numbers
            target_modules=names,
        )
