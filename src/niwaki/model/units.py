"""The heads of each attention and the neurons of each feed-forward: where they are, and how some are cut out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from niwaki.model.anatomy import Anatomy, Stack, holds

Kind = Literal["heads", "neurons"]
# How the families call the numbers that an attention keeps of itself.
HEAD_SIZES = ("attention_head_size", "head_dim", "key_value_proj_dim")
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
WIDTHS = ("all_head_size", "inner_dim", "split_size")
PREFIX = "prefix"  # the child of an attention that holds keys and values of its own, (heads, tokens, width)


@dataclass(frozen=True, eq=False)
class Units:
    """What can be taken out of one sublayer, one by one: its heads, or its neurons.

    Of each linear in `rows`, a unit owns so many neighbouring rows in every segment of it (a fused linear has a segment
    for each part that it plays), and `columns` neighbouring inputs of the linear `output`. Under grouped-query
    attention a unit is a key-value head with its query heads.
    """

    kind: Kind
    place: str  # name of the attention, or of what stands where the feed-forward ends
    count: int
    rows: Mapping[str, tuple[int, ...]]  # name of a linear: rows of a unit in each of its segments
    output: str  # the linear that reads the units
    end: str  # where it stands in its block: itself, or what was put around it
    columns: int
    size: int  # of a head; 1 for a neuron
    stack: Stack

    def row_indices(self, name: str, kept: Sequence[int]) -> list[int]:
        """The rows of a linear that these units own."""
        found, start = [], 0
        for width in self.rows[name]:
            found += spread(kept, width, start)
            start += self.count * width
        return found

    def column_indices(self, kept: Sequence[int]) -> list[int]:
        """The inputs of the output linear that these units own."""
        return spread(kept, self.columns, 0)

    def query_heads(self, kept: Sequence[int]) -> list[int]:
        """The heads of the queries that these units hold."""
        return spread(kept, self.columns // self.size, 0)

    def slices(self, model: nn.Module) -> Iterator[tuple[Tensor, int]]:
        """Each part of a weight or bias that units own, with a unit's share of it as one row: (units, share)."""
        for name, widths in self.rows.items():
            linear: Any = model.get_submodule(name)
            for tensor in (linear.weight, linear.bias):
                segments = () if tensor is None else tensor.split([self.count * width for width in widths])
                for segment in segments:
                    yield segment.reshape(self.count, -1), segment.numel() // self.count
        output: Any = model.get_submodule(self.output)
        yield output.weight.t().reshape(self.count, -1), output.weight.numel() // self.count


def spread(kept: Sequence[int], width: int, start: int) -> list[int]:
    """Every index of the units `kept`, of `width` indices each."""
    return [start + unit * width + i for unit in kept for i in range(width)]


def units_of(anatomy: Anatomy, kind: Kind) -> list[Units]:
    """The units of every sublayer that has some left, in the order in which data flows; blocks that are used again and
    again count once.

    Raises:
        ValueError: a sublayer is not built of units of one size.
    """
    seen: set[str] = set()
    found = []
    for block_name, stack, block in anatomy.named_blocks():
        attentions = iter([stack.attention, stack.cross_attention])
        for names in sublayers(stack, block):
            heads = stack.linears[names[-1]] == "output"
            place = str(next(attentions)) if heads else names[-1]
            if heads is (kind == "heads") and block_name not in seen:
                found.append(units_at(anatomy.model, block_name, stack, place, names))
        seen.add(block_name)
    return [units for units in found if units.count]


def sublayers(stack: Stack, block: nn.Module) -> Iterator[list[str]]:
    """The linears of a block, from where a sublayer begins to where it ends."""
    names: list[str] = []
    for name, played in stack.linears.items():
        if holds(block, name):
            names.append(name)
        if played in ("output", "feed_out"):
            if names and names[-1] == name:
                yield names
            names = []


def units_at(model: nn.Module, block: str, stack: Stack, place: str, names: Sequence[str]) -> Units:
    """The units of one sublayer, whose linears have these names in the block."""
    *entries, end = [inner_linear(model, f"{block}.{name}") for name in names]
    output: Any = model.get_submodule(end)
    parts = {full: stack.linears[name].split() for full, name in zip(entries, names[:-1], strict=True)}
    if stack.linears[names[-1]] == "feed_out":
        rows = {name: (1,) * len(played) for name, played in parts.items()}
        units = Units("neurons", f"{block}.{place}", output.in_features, rows, end, f"{block}.{place}", 1, 1, stack)
    else:
        units = heads_at(model, f"{block}.{place}", parts, end, f"{block}.{names[-1]}", stack)
    for name, widths in units.rows.items():
        if units.count * sum(widths) != model.get_submodule(name).out_features:
            raise ValueError(f"{name} is not built of {units.count} {units.kind} of one size")
    return units


def heads_at(
    model: nn.Module, place: str, parts: Mapping[str, list[str]], output: str, end: str, stack: Stack
) -> Units:
    """The heads of one attention."""
    attention = model.get_submodule(place)
    size = next((int(getattr(attention, name)) for name in HEAD_SIZES if hasattr(attention, name)), 0)
    inputs = int(model.get_submodule(output).in_features)  # type: ignore[arg-type]
    if not size or inputs % size:
        raise ValueError(f"{place} does not tell the size of its heads")
    queries = inputs // size
    keys = key_heads(model, parts, size, queries)
    shares = {"query": queries // max(keys, 1) * size, "key": size, "value": size}
    rows = {name: tuple(shares[part] for part in played) for name, played in parts.items()}
    return Units("heads", place, keys, rows, output, end, shares["query"], size, stack)


def key_heads(model: nn.Module, parts: Mapping[str, list[str]], size: int, queries: int) -> int:
    """How many heads keys and values have: as many as queries, or fewer under grouped-query attention."""
    alone = [name for name, played in parts.items() if played == ["key"]]
    keys = int(model.get_submodule(alone[0]).out_features) // size if alone else queries  # type: ignore[arg-type]
    if queries % max(keys, 1) or (not keys and queries):
        raise ValueError(f"{alone[0]} has {keys} heads, which do not divide the {queries} of the queries")
    return keys


def inner_linear(model: nn.Module, name: str) -> str:
    """The name of the linear that stands at `name`, or inside of what was wrapped around it."""
    for inner, module in model.get_submodule(name).named_modules():
        if hasattr(module, "in_features") and not hasattr(module, "linear") and not hasattr(module, "base_layer"):
            return f"{name}.{inner}" if inner else name
    raise ValueError(f"{name} holds no linear")


def cut(model: nn.Module, units: Units, kept: Sequence[int]) -> None:
    """Take all units of one sublayer out but those `kept`, in place; the model may be on the meta device."""
    for name in units.rows:
        cut_linear(model.get_submodule(name), rows=units.row_indices(name, kept))
    cut_linear(model.get_submodule(units.output), columns=units.column_indices(kept))
    if units.kind == "heads":
        recount(model.get_submodule(units.place), units, kept)
    if units.kind == "heads" and not kept:
        attention: Any = model.get_submodule(units.place)
        attention.forward = Silent(attention, units)


def cut_linear(linear: Any, *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> None:
    """Keep these outputs, or these inputs, of a linear."""
    if rows is not None:
        linear.weight = taken(linear.weight, 0, rows)
        linear.bias = None if linear.bias is None else taken(linear.bias, 0, rows)
        linear.out_features = len(rows)
    if columns is not None:
        linear.weight = taken(linear.weight, 1, columns)
        linear.in_features = len(columns)


def taken(parameter: nn.Parameter, dim: int, indices: Sequence[int]) -> nn.Parameter:
    """A parameter of these entries along `dim`."""
    index = torch.tensor(indices, dtype=torch.long, device=parameter.device)
    values = parameter.detach().index_select(dim, index).contiguous()
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def recount(attention: Any, units: Units, kept: Sequence[int]) -> None:
    """Bring the numbers that an attention keeps of itself in line with the heads that stayed."""
    queries = len(units.query_heads(kept))
    for name in HEAD_COUNTS:
        if hasattr(attention, name):
            setattr(attention, name, queries)
    for name in WIDTHS:
        if hasattr(attention, name):
            setattr(attention, name, queries * units.size)
    prefix = getattr(attention, PREFIX, None)
    if prefix is not None and len(prefix.key) == units.count:
        prefix.settle(*(taken(values, 0, kept) for values in (prefix.key, prefix.value)))


class Silent:
    """The forward pass of an attention without heads: what its output linear makes of nothing, which is its bias."""

    def __init__(self, attention: nn.Module, units: Units) -> None:
        self.attention = attention
        self.entry = next(iter(units.rows)).removeprefix(f"{units.place}.")
        inside = units.end.startswith(f"{units.place}.")
        self.end = units.end.removeprefix(f"{units.place}.") if inside else ""
        self.returns = 3 if "position_bias" in inspect.signature(type(attention).forward).parameters else 2

    def __call__(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        hidden = args[0] if args else given["hidden_states"]
        nothing = self.attention.get_submodule(self.entry)(hidden)  # (rows, tokens, 0)
        if given.get("key_value_states") is None:
            self._count(hidden, given.get("past_key_values"))
        output = self.attention.get_submodule(self.end)(nothing) if self.end else nothing
        return (output, *[None] * (self.returns - 1))

    def _count(self, hidden: Tensor, cache: Any) -> None:
        """Let a cache know how many tokens were read: some models ask the first layer."""
        own = getattr(cache, "self_attention_cache", cache)
        if own is not None:
            marks = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
            own.update(marks, marks, self.attention.layer_idx)
