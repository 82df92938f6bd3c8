"""Layer pruning: whole blocks leave the model, chosen by place (Sajjad et al. 2020, arXiv:2004.03844) or by their
influence on what flows through them (ShortGPT, Men et al. 2024, arXiv:2403.03853)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import KeepBlocks
from niwaki.model.text import in_decoder, text_of
from niwaki.stage import Context, Effects, Phase, Stage

FIELD = "compression.prune_layers"
By = Literal["influence", "every_other", "first", "last", "list"]
COUNTED = ("influence", "first", "last")
ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Layers(Stage):
    """Keep some blocks of every stack, in their order.

    `by=influence`: the `count` blocks of most influence. That of block i is
    BI_i = 1 - mean over positions t of cos(x_{i,t}, x_{i+1,t}), with x_i what enters the block and x_{i+1} what leaves
    it, on `rows` rows of the training split, without padding; of encoder and decoder the mean of both. `first`, `last`:
    the `count` lowest or highest ones. `every_other`: 0, 2, 4 ... `list`: the `blocks` named. Where block 0 alone holds
    something (T5, ModernBERT), it stays.
    """

    phase: ClassVar[Phase] = Phase.SHAPE
    leaves_out_blocks: ClassVar[bool] = True
    paper: ClassVar[str] = "Men et al. 2024, arXiv:2403.03853; Sajjad et al. 2020, arXiv:2004.03844"

    by: By = "influence"
    count: int | None = None
    blocks: Sequence[int] | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ConfigError(f"{FIELD}.by={self.by!r}: needs one of {', '.join(get_args(By))}")
        if (self.by == "list") != (self.blocks is not None):
            need = "needs block numbers" if self.by == "list" else f"has no effect with by={self.by}; use by=list"
            raise ConfigError(f"{FIELD}.blocks={self.blocks and list(self.blocks)}: {need}")
        for name, value, works in (("count", self.count, COUNTED), ("rows", self.rows, ("influence",))):
            if value is not None and self.by not in works:
                fitting = " or ".join(works)
                raise ConfigError(f"{FIELD}.{name}={value}: has no effect with by={self.by}; use by={fitting}")
            if value is not None and value < 1:
                raise ConfigError(f"{FIELD}.{name}={value}: needs a whole number of at least 1")

    def check(self, anatomy: Anatomy, targets: Mapping[str, nn.Linear]) -> None:
        anatomy.check_kept([0], f"{FIELD}.by={self.by}")  # whether any can be left out
        blocks = height(anatomy)
        kept = self.chosen(anatomy, [0.0] * blocks)
        if kept == list(range(blocks)):
            field = "blocks" if self.by == "list" else "count"
            raise ConfigError(f"{FIELD}.{field}: leaves out none of the {blocks} blocks; needs fewer")
        anatomy.check_kept(kept, f"{FIELD}.by={self.by}: the blocks {kept}")

    def outline(self, model: nn.Module) -> None:
        anatomy = Anatomy.of(model)
        anatomy.keep_blocks(self.chosen(anatomy, [0.0] * height(anatomy)))

    def prepare(self, model: nn.Module, context: Context) -> Effects:
        scores = [0.0] * height(context.anatomy)
        if self.by == "influence":
            found = influences(context.anatomy, context.calibration(self.rows or ROWS), context)
            context.facts["block_influence"] = found
            scores = by_number(context.anatomy, found)
        edit = KeepBlocks(blocks=self.chosen(context.anatomy, scores))
        edit.apply(model)
        return Effects(edits=[edit])

    def chosen(self, anatomy: Anatomy, scores: Sequence[float]) -> list[int]:
        """The numbers of the blocks that stay; `scores`: the influence of each."""
        blocks = len(scores)
        count = self.counted(blocks)
        if self.by == "list":
            return list(self.blocks or ())
        if self.by == "every_other":
            return list(range(0, blocks, 2))
        if self.by == "last":
            return list(range(blocks - count, blocks))
        order = list(range(blocks))
        if self.by == "influence":
            stays = any(stack.first for stack in anatomy.stacks)
            order.sort(key=lambda i: (not (stays and i == 0), -scores[i]))
        return sorted(order[:count])

    def counted(self, blocks: int) -> int:
        """How many of so many stay: half, rounded up, where `count` does not say.

        Raises:
            ConfigError: more than there are.
        """
        if self.count is not None and self.count >= blocks:
            raise ConfigError(f"{FIELD}.count={self.count}: the model has {blocks} blocks; needs fewer")
        return self.count or (blocks + 1) // 2


def height(anatomy: Anatomy) -> int:
    """The blocks of a stack; of the first one where they differ, which `check_kept` refuses."""
    return len(anatomy.blocks_of(anatomy.stacks[0]))


def by_number(anatomy: Anatomy, found: Mapping[str, float]) -> list[float]:
    """The mean of a value per block over the stacks, by the number of the block."""
    columns = [[found[name] for name, its, _ in anatomy.named_blocks() if its is stack] for stack in anatomy.stacks]
    return [sum(column) / len(columns) for column in zip(*columns, strict=True)]


def influences(anatomy: Anatomy, batches: Sequence[Mapping[str, Tensor]], context: Context) -> dict[str, float]:
    """Block influence of each block by its name: 1 - the mean cosine of what enters and what leaves it."""
    model = anatomy.model
    gathered = {name: Similarity() for name, _, _ in anatomy.named_blocks()}
    hooks = [
        block.register_forward_hook(gathered[name].add, with_kwargs=True) for name, _, block in anatomy.named_blocks()
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                for name, similarity in gathered.items():
                    similarity.mask = text_of(batch, in_decoder(anatomy, name))
                model(**context.inputs(batch))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return {name: 1 - similarity.mean for name, similarity in gathered.items()}


class Similarity:
    """The mean cosine of input and output of a block, over all positions that are no padding."""

    def __init__(self) -> None:
        self.total = 0.0
        self.positions = 0
        self.mask: Tensor | None = None  # (rows, positions), of the batch that goes through

    @property
    def mean(self) -> float:
        return self.total / self.positions

    def add(self, block: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        """Forward hook of the block; hidden states are (rows, positions, width)."""
        before = args[0] if args else given["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = functional.cosine_similarity(before.double(), after.double(), dim=-1)
        assert self.mask is not None
        text = cosine[:, -self.mask.shape[1] :]  # without demonstrations in front of it
        self.total += float(text[self.mask].sum())
        self.positions += int(self.mask.sum())
