"""Factorised embeddings: a narrow table and a projection (ALBERT, Lan et al. 2020, arXiv:1909.11942), from the
truncated singular value decomposition of the whole table (Eckart & Young 1936)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.embeddings import FactorizedEmbedding, FactorizeEmbeddings, table_of
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.factorize_embeddings"


@dataclass(frozen=True, kw_only=True)
class Embeddings(Stage):
    """E (tokens, width) becomes A B, with A (tokens, rank) and B (rank, width).

    With E = U S V^T, A = U_r S_r and B = V_r^T: their product is the nearest of that rank. An output layer that is tied
    to E is tied to both factors, logits = A (B h); one with weights of its own keeps them.

    `rank`: null for a quarter of the width.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    paper: ClassVar[str] = "Lan et al. 2020, arXiv:1909.11942; Eckart & Young 1936"

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"{FIELD}.rank={self.rank}: needs a whole number of at least 1")

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        model: Any = anatomy.model
        if isinstance(model.get_input_embeddings(), FactorizedEmbedding):
            raise ConfigError(f"{FIELD}: the embeddings of this model are factors already; leave it out")
        tokens, width = table_of(model).weight.shape
        least = tokens * width // (tokens + width)
        if not 0 < self.chosen(width) * (tokens + width) < tokens * width:
            raise ConfigError(
                f"{FIELD}.rank={self.rank}: two factors of it are no smaller than the table of {tokens} x {width}; "
                f"needs at most {least}"
            )

    def chosen(self, width: int) -> int:
        """The rank."""
        return width // 4 if self.rank is None else self.rank

    def outline(self, model: nn.Module) -> None:
        FactorizeEmbeddings(rank=self.chosen(table_of(model).embedding_dim)).apply(model)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        table = table_of(model).weight.detach()
        rank = self.chosen(table.shape[1])
        narrow, projection = factors(table, rank)
        context.facts["embedding_error"] = float((narrow @ projection - table).norm() / table.norm())
        edit = FactorizeEmbeddings(rank=rank)
        edit.apply(model)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            embeddings.table.weight.copy_(narrow)
            embeddings.projection.weight.copy_(projection.T)
        return Effects(edits=[edit])


def factors(table: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (tokens, rank) and B (rank, width) of the nearest product of that rank. From the eigenvectors of E^T E (width,
    width), in double precision: far cheaper than of E itself, which has a row for each token."""
    exact = table.double()
    _, vectors = torch.linalg.eigh(exact.T @ exact)  # in ascending order
    projection = vectors.flip(1)[:, :rank].T
    return (exact @ projection.T).to(table.dtype), projection.to(table.dtype)
