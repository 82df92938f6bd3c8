"""Where the parts of a transformer are: its blocks, attention and feed-forward linears, norms, embeddings, head.

A family of models is one file in `families/`, named after the `model_type` of its Hugging Face config.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.weights import shared_parameters

PARTS = ("query", "key", "value", "output", "feed_in", "feed_gate", "feed_out")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Blocks that follow each other. `blocks` is relative to the backbone (a `*` in it stands for every member of a
    list), the other names to a block.

    `linears` holds the linears of a block in the order in which data flows, and the parts that each plays: one, or
    several at once where they are fused ("query key value"). Cross attention plays the same parts again.
    """

    blocks: str
    attention: str
    attention_norm: str
    feed_norm: str
    linears: Mapping[str, str]
    optional: frozenset[str] = frozenset()  # linears that only some models of the family have
    cross_attention: str | None = None
    cross_norm: str | None = None
    count: str = "num_hidden_layers"  # the field of the config with the number of blocks
    heads: str = "num_attention_heads"  # ... of query heads
    neurons: str = "intermediate_size"  # ... of neurons of a feed-forward
    first: str | None = None  # why block 0 has to stay the first one

    def __post_init__(self) -> None:
        assert all(set(parts.split()) <= set(PARTS) for parts in self.linears.values())
        assert self.optional <= set(self.linears)

    def named(self, part: str, block: nn.Module) -> Iterator[str]:
        """The names, in `block`, of what plays a part: a norm, or the first linear of each sublayer that does."""
        if part.endswith("_norm"):
            name = getattr(self, part)
            yield from [name] if name and holds(block, name) else []
            return
        seen = False  # in this sublayer, which ends where its output is projected
        for name, played in self.linears.items():
            if not seen and part in played.split() and holds(block, name):
                seen = True
                yield name
            seen = seen and played not in ("output", "feed_out")

    def norm_before(self, linear: str) -> str | None:
        """The norm of a block that stands before its sublayers whose output this linear of it reads; None for one that
        reads something else: keys and values of cross attention read the encoder."""
        attention = [self.attention_norm, self.cross_norm]
        for name, played in self.linears.items():
            parts = played.split()
            if name == linear:
                if "feed_in" in parts or "feed_gate" in parts:
                    return self.feed_norm
                crosses = len(attention) < 2 and "query" not in parts
                return None if crosses or played in ("output", "feed_out") else attention[0]
            if played == "output":
                attention.pop(0)
        raise AssertionError(f"{linear} is no linear of these blocks")


def table_of_positions(config: Any) -> int | None:
    """As many positions as the config says; None where it sets no bound."""
    return getattr(config, "max_position_embeddings", None)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One stack of blocks, or several in the order in which data flows. A model may lack one: a decoder alone."""

    stacks: tuple[Stack, ...]
    causal: bool  # a position sees only those before it
    post_norm: bool  # the norms follow the residual sums, rather than stand before the sublayers
    pooler: str | None = None  # of the backbone; above the blocks
    reads_end: bool = False  # the head of its classifier reads the last end token of a row
    positions: Callable[[Any], int | None] = table_of_positions  # config -> tokens that can be read at once
    fixed: Callable[[Any], str | None] = lambda config: None  # config -> why no block can be left out
    beside_stream: tuple[str, ...] = ()  # tables of the backbone that blocks read beside what flows through them
    edits: Callable[[Any], list[Edit]] = lambda config: []  # config -> what a model is changed to when it is loaded
    # (attention, the heads of the whole model that it still has): mends what else there is for each head
    heads_cut: Callable[[nn.Module, Sequence[int]], None] = lambda attention, heads: None
    # By class of transformers: the weights that other models of the family store under another name (a pattern).
    renamed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def file_of(model_type: str) -> str:
    """The file in `families/` that describes this `model_type`; a name of a module has no hyphen."""
    return model_type.replace("-", "_")


def known_families() -> list[str]:
    """The model types that have a family file."""
    from transformers import CONFIG_MAPPING

    folder = importlib.import_module("niwaki.model.families")
    files = {module.name for module in pkgutil.iter_modules(folder.__path__)}
    return sorted(kind for kind in CONFIG_MAPPING if file_of(kind) in files)


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        ConfigError: no file in `families/` describes this `model_type`.
    """
    known, file = known_families(), file_of(config.model_type)
    if config.model_type not in known:
        raise ConfigError(
            f"model: the family {config.model_type!r} is not known; known: {', '.join(known)} "
            f"(add src/niwaki/model/families/{file}.py to describe it)"
        )
    return importlib.import_module(f"niwaki.model.families.{file}").FAMILY


def adapt(model: Any) -> list[Edit]:
    """Change a loaded model into what its family needs it to be; a second time nothing changes. Returns the edits."""
    edits = family_of(model.config).edits(model.config)
    for edit in edits:
        edit.apply(model)
    return edits


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model."""

    model: nn.Module
    family: Family

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """The anatomy of a Hugging Face model with a head."""
        return cls(model, family_of(model.config))

    @property
    def backbone(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model  # type: ignore[return-value]

    @property
    def prefix(self) -> str:
        """Name of the backbone in the model, with the dot; empty for a bare backbone."""
        return "" if self.backbone is self.model else f"{self.model.base_model_prefix}."

    @property
    def stacks(self) -> list[Stack]:
        """The stacks that this model has."""
        return [stack for stack in self.family.stacks if self._lists_of(stack)]

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks of all stacks, in order."""
        return nn.ModuleList(block for _, _, block in self.named_blocks())

    def named_blocks(self) -> Iterator[tuple[str, Stack, nn.Module]]:
        """(full name, stack, block) of each block, in order."""
        for stack in self.stacks:
            for name in self._lists_of(stack):
                for index, block in self.backbone.get_submodule(name).named_children():
                    yield f"{self.prefix}{name}.{index}", stack, block

    def blocks_of(self, stack: Stack) -> list[nn.Module]:
        """The blocks of one stack, in order."""
        return [block for _, its, block in self.named_blocks() if its is stack]

    def uses_of(self, stack: Stack) -> list[nn.Module]:
        """The blocks of one stack as they run, in order: one that is used several times stands there as often."""
        lists = [self.backbone.get_submodule(name) for name in self._lists_of(stack)]
        return [block for blocks in lists for block in blocks._modules.values() if block is not None]

    def _lists_of(self, stack: Stack) -> list[str]:
        """The lists of the backbone that hold the blocks of a stack; none where this model lacks it."""
        above, star, inner = stack.blocks.partition(".*.")
        if not holds(self.backbone, above):
            return []
        members = self.backbone.get_submodule(above).named_children() if star else ()
        return [f"{above}.{index}.{inner}" for index, _ in members] if star else [above]

    @property
    def embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def causal(self) -> bool:
        """Whether a position sees only those before it."""
        return self.family.causal or bool(getattr(self.model.config, "is_decoder", False))

    @property
    def fills_in(self) -> bool:
        """Whether it says of hidden tokens what they are, from both sides; others are hidden in each epoch."""
        config: Any = self.model.config
        writes = self.causal or config.is_encoder_decoder
        return not writes and self.model.get_output_embeddings() is not None  # type: ignore[operator]

    @property
    def positions(self) -> int | None:
        """The tokens of a text that the model can read at once; None where its config sets no bound."""
        count = self.family.positions(self.model.config)
        return None if count is None else count - getattr(self.backbone, "virtual_tokens", 0) - self.tokens_shown

    @property
    def tokens_shown(self) -> int:
        """Tokens of demonstrations that the model reads before every text."""
        return int(getattr(getattr(self.model, "words", None), "tokens_before", 0))

    @property
    def reads_end(self) -> bool:
        """Whether the head reads the last end token of a row, and needs as many of them in each row of a batch."""
        return self.family.reads_end and hasattr(self.model, "classification_head")

    def linears(self) -> dict[str, nn.Linear]:
        """The linears of the blocks by their full name. Heads, embeddings and tied weights are not among them. Where
        a layer that grew later stands in place of a linear, those inside of it."""
        return {name: linear for name, _, linear in self._played()}

    def part_names(self, parts: Iterable[str]) -> list[str]:
        """The full names of the linears of all blocks that play one of these `PARTS`."""
        wanted = set(parts)
        return [name for name, played, _ in self._played() if wanted & played]

    def _played(self) -> Iterator[tuple[str, set[str], nn.Linear]]:
        """(full name, parts that it plays, linear) of each linear of the blocks, in the order in which data flows."""
        tied = shared_parameters(self.model)
        for place, stack, block in self.named_blocks():
            for part, played in stack.linears.items():
                if part in stack.optional and not holds(block, part):
                    continue
                for inner, linear in block.get_submodule(part).named_modules():
                    # nothing is left of a linear whose sublayer was cut out
                    if isinstance(linear, nn.Linear) and linear.weight.numel() and id(linear.weight) not in tied:
                        yield ".".join(filter(None, (place, part, inner))), set(played.split()), linear

    def places(self, part: str) -> list[str]:
        """The full names of what plays a part ("output", "feed_norm") in each block, in order: a norm, or a linear (or
        the layer that stands in place of it); of several linears with one part in a sublayer, the first."""
        return [f"{place}.{name}" for place, stack, block in self.named_blocks() for name in stack.named(part, block)]

    def parts_of(self, name: str) -> list[str]:
        """The parts that a linear of the blocks plays, in the order of its rows. `name`: its full name, or that of
        what stands inside of it."""
        _, stack, linear = self._place_of(name)
        return stack.linears[linear].split()

    def norm_before(self, name: str) -> str | None:
        """The full name of the norm whose output a linear of the blocks reads; None where it reads something else, or
        where the residual stream reads the same. `name`: as in `parts_of`."""
        place, stack, linear = self._place_of(name)
        norm = None if self.family.post_norm else stack.norm_before(linear)
        return None if norm is None or not holds(self.model, f"{place}.{norm}") else f"{place}.{norm}"

    def _place_of(self, name: str) -> tuple[str, Stack, str]:
        """(full name of the block, its stack, name in the block) of the linear that stands, or holds what stands,
        there."""
        for place, stack, _ in self.named_blocks():
            for linear in stack.linears:
                if f"{name}.".startswith(f"{place}.{linear}."):
                    return place, stack, linear
        raise AssertionError(f"{name} is no linear of the blocks")

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of everything above the blocks: pooler and task head; a tied output layer counts as head."""
        inside = {id(parameter) for parameter in self.backbone.parameters()}
        head = {n: p for n, p in self.model.named_parameters() if id(p) not in inside}
        pooler = self.family.pooler and getattr(self.backbone, self.family.pooler, None)
        if isinstance(pooler, nn.Module):
            for name, parameter in pooler.named_parameters():
                head[f"{self.prefix}{self.family.pooler}.{name}"] = parameter
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        if output is not None:
            head |= {f"output.{name}": p for name, p in output.named_parameters()}
        return head

    def keep_blocks(self, indices: Sequence[int]) -> None:
        """Keep only these blocks of every stack, in this order; the config follows.

        Raises:
            ConfigError: an index is out of range, or given twice; the stacks differ in depth; the family has blocks
                that cannot be left out, or block 0, which differs from all others, would not stay the first.
        """
        self.check_kept(indices, f"model.layers={list(indices)}")
        config: Any = self.model.config
        for stack in self.stacks:
            blocks = self.blocks_of(stack)
            kept = nn.ModuleList([blocks[i] for i in indices])
            for position, block in enumerate(kept):
                for module in block.modules():
                    if hasattr(module, "layer_idx"):
                        module.layer_idx = position  # type: ignore[assignment]
            above, _, leaf = stack.blocks.rpartition(".")
            parent: Any = self.backbone.get_submodule(above)
            setattr(parent, leaf, kept)
            setattr(config, stack.count, len(kept))
            if getattr(parent, "config", config) is not config:  # T5's stacks have a copy of their own
                parent.config.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in indices]

    def check_kept(self, indices: Sequence[int], setting: str) -> None:
        """Raise ConfigError, which names the `setting`, where `keep_blocks` cannot keep these."""
        if reason := self.family.fixed(self.model.config):
            raise ConfigError(f"{setting}: {reason}, so none can be left out; leave it out")
        counts = [len(self.blocks_of(stack)) for stack in self.stacks]
        if len(set(counts)) > 1:
            raise ConfigError(
                f"{setting}: counts in every stack of the model alike, and they have {' and '.join(map(str, counts))} "
                "blocks; leave it out"
            )
        if any(len(self.uses_of(stack)) != counts[0] for stack in self.stacks):
            raise ConfigError(f"{setting}: blocks of this model share their weights, so none can be left out")
        wrong = [i for i in indices if not 0 <= i < counts[0]]
        if wrong or not indices or len(set(indices)) != len(indices):
            raise ConfigError(f"{setting}: needs different layer numbers in 0..{counts[0] - 1}")
        reason = next((stack.first for stack in self.stacks if stack.first), None)
        if reason and indices[0] != 0:
            raise ConfigError(f"{setting}: needs 0 as the first, since {reason}")


def holds(module: nn.Module, name: str) -> bool:
    """Whether there is a submodule of this name."""
    for step in name.split("."):
        child = module._modules.get(step)
        if child is None:
            return False
        module = child
    return True
