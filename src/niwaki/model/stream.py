"""The residual stream: what writes to it, what reads it, the norms in it, and how channels of it are cut out.

They are found by dye, on a model that may be empty: what enters the first block of a stack is made to ask for a
gradient, and nothing else does, so every module whose input asks for one reads the stream. Behind a linear the dye
stops. This tells the linear of a pooler, which reads the stream, from the classifier behind it, which is as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.compression.factorize.low_rank import LowRankLinear
from niwaki.edits import Edit
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import attending_to_nothing, shapes_alone
from niwaki.model.embeddings import FactorizedOutput, replace_parameter
from niwaki.model.units import taken
from niwaki.tuning.bottleneck import Adapted, Wrapper
from niwaki.tuning.prefixed_attention import probe_inputs
from niwaki.weights import Packed


@dataclass(frozen=True)
class Stream:
    """The names of the modules at a stream of so many channels: `tables` of embeddings and linears that write to it
    (`entrances` are those in front of the blocks), linears that read it, and norms over its channels. The linear of a
    head whose output layer is tied to the tables does both."""

    width: int
    tables: tuple[str, ...]
    entrances: tuple[str, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[str, ...]

    def slices(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
        """(tensor, the dimension of its channels) of each weight and bias, once; those of the norms are not among
        them."""
        seen: set[tuple[int, int]] = set()
        for names, dim in ((self.tables, 1), (self.writers, 0), (self.readers, 1)):
            for name in names:
                module: Any = model.get_submodule(name)
                bias = module.bias if names is self.writers else None
                for tensor in (module.weight, bias):
                    if tensor is not None and (id(tensor), dim) not in seen:
                        seen.add((id(tensor), dim))
                        yield tensor, dim


def stream_of(anatomy: Anatomy) -> Stream:
    """The stream of a model; encoder and decoder have one between them.

    Raises:
        ValueError: something at the stream is not known, or is stored as codes.
    """
    tables, entrances, norms = entrance(anatomy)
    inside = [name for part in ("output", "feed_out") for place in ends(anatomy, part)
              for name in writers_at(anatomy.model, place)]  # fmt: skip
    with dyed(anatomy, inside) as dye:
        for table in beside(anatomy):
            table.weight.requires_grad_()
        dye.pour_into_blocks()
        dye.run(anatomy)
    names = {id(module): name for name, module in anatomy.model.named_modules()}
    tables += [names[id(table)] for table in beside(anatomy)]
    head = tied_head(anatomy, (*tables, *entrances), dye.readers)
    with dyed(anatomy, head) as above:
        if head:
            above.run(anatomy)
    stream = Stream(
        width=int(anatomy.model.get_submodule(inside[0]).out_features),  # type: ignore[arg-type]
        tables=tuple(tables), entrances=tuple(entrances), writers=(*entrances, *inside, *head),
        readers=(*dye.readers, *above.readers), norms=tuple(dict.fromkeys((*norms, *dye.norms, *above.norms))),
    )  # fmt: skip
    check(anatomy.model, stream)
    return stream


def tied_head(anatomy: Anatomy, entering: Sequence[str], readers: Sequence[str]) -> list[str]:
    """The linear of the head that reads the stream and makes it anew, for an output layer that is tied to what tokens
    enter by; none where the output layer reads the stream itself, or is no such one."""
    model: Any = anatomy.model
    output = model.get_output_embeddings()
    tensors = {id(model.get_submodule(name).weight) for name in entering}
    if output is None or not any(id(parameter) in tensors for parameter in output.parameters()):
        return []
    backbone = set(anatomy.backbone.modules())
    return [name for name in readers if model.get_submodule(name) not in {*backbone, output}]


def check(model: nn.Module, stream: Stream) -> None:
    """Raise ValueError unless everything has one channel for each of the stream."""
    for tensor, dim in stream.slices(model):
        if tensor.shape[dim] != stream.width:
            raise ValueError(f"its stream is {stream.width} wide in one place and {tensor.shape[dim]} in another")


def ends(anatomy: Anatomy, part: str) -> list[str]:
    """Where a sublayer gives to the stream; blocks that are used again and again count once."""
    return list(dict.fromkeys(anatomy.places(part)))


def writers_at(model: nn.Module, place: str) -> list[str]:
    """The linears that give to the stream at the end of a sublayer: the one that stands there, or its last factor, and
    those at the end of its adapters."""
    standing: Any = model.get_submodule(place)
    adapters = [f"{place}.adapter.{name}.up" for name in standing.adapter] if isinstance(standing, Adapted) else []
    while isinstance(standing, (Wrapper, LowRankLinear)):
        inner = "linear" if isinstance(standing, Wrapper) else "up"
        standing, place = standing.get_submodule(inner), f"{place}.{inner}"
    if not isinstance(standing, nn.Linear):
        raise ValueError(f"{place} is no linear ({type(standing).__name__})")
    return [place, *adapters]


def beside(anatomy: Anatomy) -> list[Any]:
    """Tables of the stream's width that the blocks read beside it."""
    found = [getattr(anatomy.backbone.get_submodule(at.rpartition(".")[0]), at.rpartition(".")[2], None)
             for at in anatomy.family.beside_stream]  # fmt: skip
    return [table for table in found if table is not None]


def entrance(anatomy: Anatomy) -> tuple[list[str], list[str], list[str]]:
    """(tables, linears, norms) through which tokens become the stream: those whose output arrives at a first block
    without a linear in between."""
    tables: list[str] = []
    writers: list[str] = []
    norms: list[str] = []
    for name, module in outside(anatomy):
        with dyed(anatomy) as dye:
            dye.pour_out_of(name)
            dye.run(anatomy)
        if dye.arrived:
            (tables if isinstance(module, nn.Embedding) else writers).append(name)
            norms += dye.norms
    weights = {id(anatomy.model.get_submodule(name).weight) for name in tables}
    tables += [n for n, m in outside(anatomy) if n not in tables and id(m.weight) in weights]  # looked up by none
    return tables, writers, norms


def outside(anatomy: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    """The tables and linears of the backbone that are in no block."""
    inside = tuple(f"{name}." for name, _, _ in anatomy.named_blocks())
    for name, module in anatomy.backbone.named_modules():
        full = f"{anatomy.prefix}{name}"
        if isinstance(module, (nn.Embedding, nn.Linear)) and not full.startswith(inside):
            yield full, module


class Dye:
    """Where what was dyed came to: `readers` and `norms` by their name, and whether it `arrived` at a first block.
    What these `writers` give is dyed too: an adapter may read it before it joins the stream."""

    def __init__(self, anatomy: Anatomy, writers: Sequence[str]) -> None:
        self.anatomy = anatomy
        self.writers = writers
        self.readers: list[str] = []
        self.norms: list[str] = []
        self.arrived = False
        self.handles = [
            module.register_forward_hook(self._seen(name), with_kwargs=True)
            for name, module in anatomy.model.named_modules()
            if module._parameters or "weight" in module._buffers or isinstance(module, (Packed, FactorizedOutput))
        ]

    def pour_into_blocks(self) -> None:
        """Dye what enters the first block of each stack."""
        self._at_blocks(lambda hidden: hidden.detach().requires_grad_())

    def pour_out_of(self, name: str) -> None:
        """Dye what one module gives, up to the first blocks."""
        module = self.anatomy.model.get_submodule(name)
        self.handles.append(module.register_forward_hook(lambda _, __, output: output.detach().requires_grad_()))
        self._at_blocks(self._take_note)

    def _take_note(self, hidden: Tensor) -> Tensor:
        self.arrived |= hidden.requires_grad
        return hidden.detach()

    def _at_blocks(self, change: Callable[[Tensor], Tensor]) -> None:
        def enter(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
            if args:
                return (change(args[0]), *args[1:]), given
            return args, given | {"hidden_states": change(given["hidden_states"])}

        for stack in self.anatomy.stacks:
            first = self.anatomy.uses_of(stack)[0]
            self.handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))

    def _seen(self, name: str) -> Callable[..., Any]:
        def see(module: Any, args: Any, given: dict[str, Any], output: Any) -> Any:
            if name in self.writers:
                return output.detach().requires_grad_()
            values = [value for value in (*args, *given.values()) if isinstance(value, Tensor)]
            reads = any(value.requires_grad for value in values)
            if not reads or not isinstance(output, Tensor) or not output.requires_grad:  # some ask for a shape alone
                return None
            if isinstance(module, (nn.Linear, FactorizedOutput)):  # the latter shares the factors of the embeddings
                if isinstance(module, nn.Linear) and name not in self.readers:
                    self.readers.append(name)
                return output.detach()
            if isinstance(module, Packed):
                raise ValueError(f"{name} stores its weights as codes")
            if module.weight.dim() != 1 or module.weight.shape[0] != output.shape[-1]:
                raise ValueError(f"{name} ({type(module).__name__}) reads the stream in a way that is not known")
            if name not in self.norms:
                self.norms.append(name)
            return None

        return see

    def run(self, anatomy: Anatomy) -> None:
        """A forward pass of a short text, of the whole model where its head asks nothing of the text."""
        with attending_to_nothing(anatomy):
            (anatomy.backbone if anatomy.reads_end else anatomy.model)(**probe_inputs(anatomy))
        if anatomy.reads_end:
            self.readers.append("classification_head.dense")


@contextmanager
def dyed(anatomy: Anatomy, writers: Sequence[str] = ()) -> Iterator[Dye]:
    """Let nothing ask for a gradient but what a dye is poured into; the model is as before in the end."""
    model: Any = anatomy.model
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training, dye = model.training, Dye(anatomy, writers)
    try:
        model.requires_grad_(False).eval()
        with torch.enable_grad(), shapes_alone(model):
            yield dye
    finally:
        for handle in dye.handles:
            handle.remove()
        model.requires_grad_(False).train(training)
        for parameter in asked:
            parameter.requires_grad_()


@dataclass(frozen=True, kw_only=True)
class KeepWidth(Edit):
    """Keep only these channels of the residual stream. `kept`: their numbers, or how many, once the weights are cut."""

    kept: int

    def apply(self, model: Any) -> None:
        stream = stream_of(Anatomy.of(model))
        if not 0 < self.kept <= stream.width:
            raise ValueError(f"the stream has {stream.width} channels, of which {self.kept} cannot stay")
        keep_channels(model, stream, range(self.kept))


def keep_channels(model: nn.Module, stream: Stream, kept: Sequence[int]) -> None:
    """Cut all channels of the stream out but those `kept`, in place; what is tied stays so."""
    for tensor, dims in together([*stream.slices(model), *((scale, 0) for scale in scales(model, stream))]):
        cut = tensor
        for dim in dims:
            cut = taken(cut, dim, kept)
        replace_parameter(model, tensor, cut)
    sizes = ("embedding_dim", stream.tables), ("out_features", stream.writers), ("in_features", stream.readers)
    for size, names in sizes:
        for name in names:
            setattr(model.get_submodule(name), size, len(kept))
    for name in stream.norms:
        norm: Any = model.get_submodule(name)
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (len(kept),)


def together(slices: Sequence[tuple[nn.Parameter, int]]) -> Iterator[tuple[nn.Parameter, list[int]]]:
    """(tensor, all dimensions of its channels)."""
    dims: dict[int, list[int]] = {}
    for tensor, dim in slices:
        dims.setdefault(id(tensor), []).append(dim)
    yield from ((tensor, dims.pop(id(tensor))) for tensor, _ in slices if id(tensor) in dims)


def scales(model: nn.Module, stream: Stream) -> Iterator[nn.Parameter]:
    """The weights and biases of the norms."""
    for name in stream.norms:
        yield from model.get_submodule(name).parameters(recurse=False)
