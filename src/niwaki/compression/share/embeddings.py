"""Weight tying: the output layer of a language model is its table of input embeddings (Press & Wolf 2017,
arXiv:1608.05859)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.embeddings import TieEmbeddings, is_tied, table_of
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.share_embeddings"


@dataclass(frozen=True, kw_only=True)
class Embeddings(Stage):
    """logits = E h + b, with the E (tokens, width) by which tokens are looked up; a bias stays.

    `start`: E is the `input` table as it was, the `output` layer's weight, or the `average` of the two. The two tables
    of a trained model lie far apart, so the model has to be tuned afterwards.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    paper: ClassVar[str] = "Press & Wolf 2017, arXiv:1608.05859"

    start: Literal["input", "output", "average"] = "input"

    def __post_init__(self) -> None:
        if self.start not in ("input", "output", "average"):
            raise ConfigError(f"{FIELD}.start={self.start!r}: needs input, output or average")

    def conflict(self, others: Sequence[Stage]) -> str | None:
        if any(other.name == "factorize/embeddings" for other in others):
            return (
                f"{self.name} and factorize/embeddings: factors are no table that an output layer could take as its "
                "weight; leave one out"
            )
        return None

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        model: Any = anatomy.model
        output = model.get_output_embeddings()
        if output is None:
            raise ConfigError(f"{FIELD}: this model has no output layer over its tokens; needs a language model")
        if is_tied(model):
            raise ConfigError(f"{FIELD}: the output layer of this model is tied to its embeddings already")
        table = table_of(model).weight  # of factorised embeddings, the narrow one
        if output.weight.shape != table.shape:
            raise ConfigError(
                f"{FIELD}: the embeddings are {tuple(table.shape)}, the output layer {tuple(output.weight.shape)}; "
                "needs one shape"
            )

    def outline(self, model: nn.Module) -> None:
        TieEmbeddings().apply(model)

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        table, output = table_of(model).weight, model.get_output_embeddings().weight  # type: ignore[operator]
        with torch.no_grad():
            if self.start == "output":
                table.copy_(output)
            if self.start == "average":
                table.copy_((table + output) / 2)
        edit = TieEmbeddings()
        edit.apply(model)
        return Effects(edits=[edit])
