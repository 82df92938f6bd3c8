"""Where the parts of a transformer are: its blocks, attention and feed-forward linears, norms, embeddings, head.

A family of models is one file in `families/`, named after the `model_type` of its Hugging Face config.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from niwaki.errors import ConfigError
from niwaki.weights import shared_parameters


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names of the parts; those of a block are relative to the block, the others to the backbone."""

    blocks: str
    query: str
    key: str
    value: str
    output: str
    feed_in: str
    feed_out: str
    feed_gate: str | None = None
    attention_norm: str
    feed_norm: str
    embeddings: str
    pooler: str | None = None
    attention: str  # the module of a block that holds `layer_idx`
    causal: bool  # a position sees only those before it
    positions_after_padding: bool = False  # position numbers start behind that of the padding token

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears of a block, in the order in which data flows."""
        names = (self.query, self.key, self.value, self.output, self.feed_gate, self.feed_in, self.feed_out)
        return tuple(name for name in names if name)


def known_families() -> list[str]:
    """The model types that have a family file."""
    folder = importlib.import_module("niwaki.model.families")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def family_of(config: Any) -> Family:
    """The family of a Hugging Face config.

    Raises:
        ConfigError: no file in `families/` describes this `model_type`.
    """
    known = known_families()
    if config.model_type not in known:
        raise ConfigError(
            f"model: the family {config.model_type!r} is not known; known: {', '.join(known)} "
            f"(add src/niwaki/model/families/{config.model_type}.py to describe it)"
        )
    return importlib.import_module(f"niwaki.model.families.{config.model_type}").FAMILY


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
    def blocks(self) -> nn.ModuleList:
        return self.backbone.get_submodule(self.family.blocks)  # type: ignore[return-value]

    @property
    def embeddings(self) -> nn.Embedding:
        return self.backbone.get_submodule(self.family.embeddings)  # type: ignore[return-value]

    @property
    def causal(self) -> bool:
        """Whether a position sees only those before it."""
        return self.family.causal or bool(getattr(self.model.config, "is_decoder", False))

    @property
    def positions(self) -> int | None:
        """The tokens of a text that the model can read at once; None where its config sets no bound."""
        config: Any = self.model.config
        count: int | None = getattr(config, "max_position_embeddings", None)
        if count is None:
            return None
        taken = config.pad_token_id + 1 if self.family.positions_after_padding else 0
        return count - taken - getattr(self.backbone, "virtual_tokens", 0)

    def linears(self) -> dict[str, nn.Linear]:
        """The linears of the blocks by their full name. Heads, embeddings and tied weights are not among them."""
        tied = shared_parameters(self.model)
        found = {}
        for index, block in enumerate(self.blocks):
            for name in self.family.linears:
                linear = block.get_submodule(name)
                if id(linear.weight) not in tied:
                    found[f"{self.prefix}{self.family.blocks}.{index}.{name}"] = linear
        return found  # type: ignore[return-value]

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
        """Keep only these blocks, in this order; the config follows.

        Raises:
            ConfigError: an index is out of range, or given twice.
        """
        count = len(self.blocks)
        wrong = [i for i in indices if not 0 <= i < count]
        if wrong or not indices or len(set(indices)) != len(indices):
            raise ConfigError(f"model.layers={list(indices)}: needs different layer numbers in 0..{count - 1}")
        kept = nn.ModuleList([self.blocks[i] for i in indices])
        for position, block in enumerate(kept):
            attention = block.get_submodule(self.family.attention)
            if hasattr(attention, "layer_idx"):
                attention.layer_idx = position  # type: ignore[assignment]
        parent, _, leaf = self.family.blocks.rpartition(".")
        setattr(self.backbone.get_submodule(parent), leaf, kept)
        config: Any = self.model.config
        config.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in indices]
