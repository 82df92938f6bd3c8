"""Integer embeddings: the tables by which tokens enter a model, on a grid (Q8BERT, Zafrir et al. 2019,
arXiv:1910.06188)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from niwaki.compression.quantize.integers import IntegerGrid
from niwaki.compression.quantize.layout import check_bits
from niwaki.compression.quantize.tables import UseIntegerTables, users
from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.embeddings import table_of
from niwaki.stage import Context, Effects, Phase, Stage
from niwaki.weights import stack

FIELD = "compression.quantize_embeddings"


@dataclass(frozen=True, kw_only=True)
class Embeddings(Stage):
    """E[token] = round(E[token] / s) s, with s = max|E[token]| / q for each token; backward: straight through.

    Q8BERT has one scale for the whole table. An output layer that is tied to the table multiplies with the same codes.
    `bits`: 2 to 8. `group`: neighbours in a row that share a scale; null for the whole row. `trained`: the fit runs
    through the grid, as in the paper; false rounds once, after it. `positions`: the plain tables that stand beside that
    of the tokens too: of positions and segments.
    """

    phase: ClassVar[Phase] = Phase.QUANTIZE
    acts_on: ClassVar[Literal["linears", "embeddings"]] = "embeddings"
    turn: ClassVar[int] = -1  # what looks at activations after it sees those of rounded embeddings
    paper: ClassVar[str] = "Zafrir et al. 2019, arXiv:1910.06188"

    bits: int = 8
    group: int | None = None
    trained: bool = True
    positions: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, self.group, FIELD)

    @property
    def during_fit(self) -> bool:  # type: ignore[override]
        """Whether the fit runs through the grid."""
        return self.trained

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        for name, table in self.tables(anatomy).items():
            if self.group and table.embedding_dim % self.group:
                raise ConfigError(
                    f"{FIELD}.group={self.group}: {name} has rows of {table.embedding_dim}, which it does not divide"
                )

    def tables(self, anatomy: Anatomy) -> dict[str, nn.Embedding]:
        """Each table once, by one name."""
        model: Any = anatomy.model
        tokens, entrance = table_of(model), model.get_input_embeddings()
        found = {name: module for name, module in model.named_modules() if module is tokens}
        for place, parent in model.named_modules() if self.positions else ():
            children = parent._modules
            if any(child is entrance for child in children.values()):
                plain = {name: child for name, child in children.items() if type(child) is nn.Embedding}
                beside = {f"{place}.{name}".lstrip("."): child for name, child in plain.items()}
                found |= {name: child for name, child in beside.items() if child.weight is not tokens.weight}
        return found

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        for table in self.tables(context.anatomy).values():
            grid = IntegerGrid(self.bits, self.group)
            for name, module in users(model, table.weight).items():
                stack(module, grid)
                context.tables[name] = module
        return Effects()

    def finalize(self, model: nn.Module, context: Context) -> list[Edit]:
        found = {name: context.records.get(name) for name in context.tables}
        records = {name: record for name, record in found.items() if record}  # of a weight that several have, one
        edit = UseIntegerTables(tables=list(records), bits=self.bits, group=self.group)
        edit.apply(model)
        for name, record in records.items():
            integer: Any = model.get_submodule(name)
            integer.table.store(**record)
        return [edit]
