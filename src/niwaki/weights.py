"""A tuned, compressed weight is a function of the base weight: links stacked on a linear, folded in the end.

W_effective = quantize( share( prune( W + delta_tuning ) ) )
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from niwaki.stage import Phase


class Packed(nn.Module, abc.ABC):
    """A linear whose weight is stored as codes of a few bits each."""

    holds: ClassVar[str]  # what its tensors are, in a report
    dense: type[nn.Linear] = nn.Linear  # what it stands for, which may have a layout of its own in files
    bits: int  # of one code
    in_features: int
    out_features: int
    bias: Any  # a parameter, or None
    _operand: Tensor | None = None  # what a product takes, made of the codes when it is first needed

    @property
    def zeros_without_code(self) -> int:
        """Weights that are zero and take no code."""
        return 0

    @property
    def kernel(self) -> str:
        """What multiplies its weight."""
        return "fp32, dequantized"

    @property
    def rounds_inputs(self) -> bool:
        """Whether what enters it is rounded."""
        return bool(getattr(self, "activation_bits", None))

    @abc.abstractmethod
    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, fp32 (out, in)."""

    def put_dense(self, model: nn.Module, name: str) -> None:
        """Put a dense linear with the same weight where this one stands in `model`, by its name there."""
        linear = self.dense(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.dequantized())
        linear.bias = self.bias
        replace_module(model, name, linear)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made for the products of this machine."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_operand", "_product")}

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        self._operand = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._operand = None
        super()._load_from_state_dict(*arguments)


class Link(nn.Module, abc.ABC):
    """One function of the chain, (out, in) -> (out, in). Its state (mask, codebook ...) is in its buffers."""

    phase: ClassVar[Phase]

    @abc.abstractmethod
    def forward(self, weight: Tensor) -> Tensor: ...

    def kept(self) -> Tensor | None:
        """Where a weight is kept, booleans (out, in), of a link that sets the others to zero; None of any other."""
        return None

    def record(self, weight: Tensor) -> dict[str, Tensor]:
        """What is left of this link when the chain is folded; `weight` is what enters the link."""
        return {}


def stack(linear: nn.Module, link: Link) -> None:
    """Put `link` on top of the chain of `linear`, or of a table; the phases along a chain must rise."""
    present = [existing.phase for existing in links(linear)]
    assert not present or present[-1] < link.phase, f"{link.phase!r} stacked on {present}"
    parametrize.register_parametrization(linear, "weight", link)


def links(linear: nn.Module) -> list[Link]:
    """The chain of `linear`, base first."""
    chains: Any = getattr(linear, "parametrizations", {})
    return list(chains["weight"]) if "weight" in chains else []


def entering(linear: nn.Module, link: Link) -> Tensor:
    """The weight that enters `link`: the base weight through all the links below it. (out, in), no gradient."""
    with torch.no_grad():
        chains: Any = linear.parametrizations
        weight: Tensor = chains["weight"].original.detach()
        for below in links(linear):
            if below is link:
                return weight
            weight = below(weight)
    raise AssertionError("the link is not on this linear")


def fold(targets: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Bake every chain into its weight. Returns, by target, what its links recorded. A negative weight that was masked
    is -0.0, and becomes 0.0, which no value on disk has to stand for. A weight that several targets have is baked once,
    with the chain of the first."""
    records = {}
    baked: set[int] = set()
    with torch.no_grad():
        for name, linear in targets.items():
            chain = links(linear)
            if not chain:
                continue
            base = linear.parametrizations["weight"].original
            if id(base) in baked:
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
                continue
            baked.add(id(base))
            records[name] = {k: v for link in chain for k, v in link.record(entering(linear, link)).items()}
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            linear.weight.add_(0.0)
    return records


def cut_record(
    record: Mapping[str, Tensor], *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """What links left behind of a linear, as it will be with these outputs or these inputs alone: (out, in) and scales
    and zeros (out, 1), the factors (in,) of what enters it, and a scale () of all of that."""
    found = dict(record)
    for name, tensor in found.items():
        if rows is not None and tensor.dim() == 2:
            found[name] = tensor[list(rows)]
        if columns is not None and name not in ("scale", "zero", "input_scale"):
            found[name] = tensor[..., list(columns)]
    return found


def shared_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that more than one module owns (tied weights)."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {identity for identity, count in owners.items() if count > 1}


def repeats(model: nn.Module) -> set[str]:
    """The names of modules that stand in the model under an earlier name already: parts of a block that runs twice."""
    every = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return every - {name for name, _ in model.named_modules()}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` stands."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands; `new` may hold `old`."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                setattr(module, name, new)


def packed(model: nn.Module, name: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, Packed]]:
    """Everything packed with its first name, once; not what it is made of."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    if isinstance(model, Packed):
        yield name, model
        return
    for child, module in model.named_children():
        yield from packed(module, f"{name}.{child}" if name else child, seen)


def kernels(model: nn.Module) -> dict[str, int]:
    """The kernels that multiply packed weights where the model is now, and the number of linears of each."""
    return dict(Counter(module.kernel for _, module in packed(model)).most_common())


def to_dense(model: nn.Module) -> None:
    """Put dense weights where packed ones stand."""
    for name, module in list(packed(model)):
        module.put_dense(model, name)
