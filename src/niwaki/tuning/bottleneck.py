"""Bottlenecks: small layers between those of a frozen model, which stay in it (Houlsby et al. 2019, arXiv:1902.00751).

A linear of a block is wrapped (`Adapted`), and holds one or several named bottlenecks beside it. What else a bottleneck
reads, the input of the sublayer, is kept by a wrapper of the linear where that sublayer begins (`Entry`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.weights import replace_module

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
ENTRIES = {"output": "query", "feed_out": "feed_in"}  # the part where a sublayer begins, by the one where it ends
NORMS = {"output": "attention_norm", "feed_out": "feed_norm"}
Reads = Literal["output", "normed", "input"]
STARTS = "bottlenecks_start"  # where a model keeps the handle of its hook


class Wrapper(nn.Module):
    """A module that stands in place of a linear, and looks like it from outside."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Any:
        return self.linear.weight

    @property
    def bias(self) -> Any:
        return self.linear.bias

    @property
    def in_features(self) -> Any:
        return self.linear.in_features

    @property
    def out_features(self) -> Any:
        return self.linear.out_features


class Entry(Wrapper):
    """A linear at which a sublayer begins; keeps its first input until the end of that sublayer takes it. Whatever else
    it is asked for before that (DeBERTa has its query read relative positions too) is not what the sublayer reads."""

    _input: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self._input is None:
            self._input = values
        return self.linear(values)

    def take(self) -> Tensor:
        """The input of this forward pass, once."""
        assert self._input is not None, "a sublayer ended that had not begun"
        values = self._input
        self.forget()
        return values

    def forget(self) -> None:
        """Let go of what a pass left that did not come to its end."""
        self._input = None


class Bottleneck(nn.Module):
    """A(x) = scale (U f(D x + b) + c), with D (size, in) and U (out, size)."""

    def __init__(
        self, reads: Reads, inputs: int, size: int, outputs: int, *, activation: str, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.reads = reads
        self.scale = scale
        self.down = nn.Linear(inputs, size)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(size, outputs)

    def forward(self, values: Tensor) -> Tensor:
        change = self.up(self.dropout(self.activation(self.down(values))))
        return change if self.scale == 1 else self.scale * change


class Adapted(Wrapper):
    """y = W x at the end of a sublayer with input z, then y + A(...) for each active bottleneck, one after another.

    A bottleneck reads y ("output"), norm(y + z) ("normed", where the norm follows the residual sum), or z ("input").
    The `norm` and the entry belong to other modules: in tuples, a child of two modules would be saved twice.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        self.adapter = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self._entry: tuple[Entry, ...] = ()
        self._norm: tuple[nn.Module, ...] = ()

    def connect(self, entry: Entry, norm: nn.Module | None) -> None:
        """Tell where the sublayer begins and, for a bottleneck that reads it, which norm follows."""
        self._entry = (entry,)
        self._norm = (norm,) if norm else self._norm

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.linear(values)
        begun = self._entry[0].take() if self._entry else None
        for name in self.active:
            bottleneck: Any = self.adapter[name]
            output = output + bottleneck(self._read(bottleneck.reads, output, begun))
        return output

    def _read(self, reads: Reads, output: Tensor, begun: Tensor | None) -> Tensor:
        if reads == "output":
            return output
        assert begun is not None
        return begun if reads == "input" else self._norm[0](output + begun)


@dataclass(frozen=True, kw_only=True)
class AddBottlenecks(Edit):
    """A bottleneck of that name behind or beside each of these parts of every block; it is active."""

    adapter: str
    parts: list[str]
    reads: Reads
    size: int
    activation: str
    scale: float
    dropout: float

    def __post_init__(self) -> None:
        if (
            not set(self.parts) <= set(ENTRIES)
            or self.reads not in get_args(Reads)
            or self.activation not in ACTIVATIONS
        ):
            raise ConfigError(f"no bottleneck reads {self.reads} at {self.parts} with {self.activation}")
        numbers = isinstance(self.size, int) and all(isinstance(n, int | float) for n in (self.scale, self.dropout))
        if not numbers or self.size < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(f"no bottleneck has size {self.size}, scale {self.scale}, dropout {self.dropout}")

    def apply(self, model: Any) -> None:
        if self.adapter in edits_of(model):
            raise ValueError(f"there is an adapter {self.adapter!r} already")
        anatomy = Anatomy.of(model)
        for part in self.parts:
            also = {"output": [], "input": [ENTRIES[part]], "normed": [ENTRIES[part], NORMS[part]]}[self.reads]
            for places in zip(*map(anatomy.places, [part, *also]), strict=True):
                self.add(model, *places)
        if not edits_of(model):
            model.__dict__[STARTS] = model.register_forward_pre_hook(forget_inputs)
        edits_of(model)[self.adapter] = self

    def add(self, model: Any, end: str, entry: str | None = None, norm: str | None = None) -> None:
        """Wrap the end of one sublayer, and its entry where the bottleneck reads that, and hang a bottleneck in."""
        adapted = wrapped(model, end, Adapted)
        inputs = adapted.out_features
        if entry:
            begins = wrapped(model, entry, Entry)
            adapted.connect(begins, model.get_submodule(norm) if norm else None)
            inputs = begins.in_features if self.reads == "input" else inputs
        bottleneck = Bottleneck(
            self.reads, inputs, self.size, adapted.out_features,
            activation=self.activation, scale=self.scale, dropout=self.dropout,
        )  # fmt: skip
        held = next(itertools.chain(adapted.linear.parameters(), adapted.linear.buffers()))
        adapted.adapter[self.adapter] = bottleneck.to(held.device).train(model.training)
        adapted.active = (*adapted.active, self.adapter)


def forget_inputs(model: nn.Module, args: Any) -> None:
    """A hook before a forward pass."""
    for module in model.modules():
        if isinstance(module, Entry):
            module.forget()


def wrapped(model: nn.Module, place: str, kind: type[Any]) -> Any:
    """The wrapper at this place; a new one where there is none."""
    module = model.get_submodule(place)
    if not isinstance(module, kind):
        module = kind(module).train(model.training)
        replace_module(model, place, module)
    return module


def edits_of(model: Any) -> dict[str, AddBottlenecks]:
    """The bottlenecks of a model: by the name of the adapter, the edit that made them. In the order of making."""
    found: dict[str, AddBottlenecks] = model.__dict__.setdefault("bottlenecks", {})
    return found


def ends(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every wrapped end of a sublayer, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def bottlenecks(model: nn.Module, adapter: str) -> dict[str, Bottleneck]:
    """The bottlenecks of one adapter, by the name of the wrapper that holds them."""
    return {name: end.adapter[adapter] for name, end in ends(model) if adapter in end.adapter}  # type: ignore[misc]


def remove(model: nn.Module, adapter: str) -> None:
    """Take an adapter's bottlenecks out; without any, the model has its own structure again."""
    del edits_of(model)[adapter]
    for _, end in ends(model):
        if adapter in end.adapter:
            del end.adapter[adapter]
            end.active = tuple(name for name in end.active if name != adapter)
    if not edits_of(model):
        model.__dict__.pop(STARTS).remove()
        for name, module in list(model.named_modules()):
            if isinstance(module, Wrapper):
                replace_module(model, name, module.linear)


def free_name(model: Any, wish: str = "default") -> str:
    """`wish`, or the first of wish_2, wish_3 ... that no adapter of the model bears."""
    numbered = (f"{wish}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([wish], numbered) if name not in edits_of(model))


def width_of(anatomy: Anatomy) -> int:
    """What flows between the blocks: the outputs of a feed-forward."""
    place = anatomy.places("feed_out")[0]
    width: int = anatomy.model.get_submodule(place).out_features  # type: ignore[assignment]
    return width


def draw(model: nn.Module, adapter: str, *, seed: int, down_std: float | None, up_std: float) -> None:
    """First values, the same for the same seed: normal, cut off at two deviations; biases zero. With `down_std` null
    the down-projection is uniform as in a new linear (He et al. 2015, arXiv:1502.01852, with a = sqrt(5))."""
    generator = torch.Generator().manual_seed(seed)
    for bottleneck in bottlenecks(model, adapter).values():
        for linear, std in ((bottleneck.down, down_std), (bottleneck.up, up_std)):
            values = torch.zeros(linear.weight.shape)
            if std is None:
                nn.init.kaiming_uniform_(values, a=5**0.5, generator=generator)
            elif std:
                nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator)
            with torch.no_grad():
                linear.weight.copy_(values)
                linear.bias.zero_()


def check_size(size: int | None, reduction: int | None) -> None:
    """Raise ConfigError unless exactly one of the two says how wide a bottleneck is."""
    if size is None and reduction is None:
        raise ConfigError("tuning.size=null: needs a whole number of at least 1, or tuning.reduction in its place")
    if size is not None and reduction is not None:
        raise ConfigError(
            f"tuning.reduction={reduction}: has no effect beside tuning.size={size}; set tuning.size=null"
        )
    if size is not None and size < 1:
        raise ConfigError(f"tuning.size={size}: needs a whole number of at least 1")
    if reduction is not None and reduction < 1:
        raise ConfigError(f"tuning.reduction={reduction}: needs a whole number of at least 1")
