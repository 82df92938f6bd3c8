"""Bottleneck adapters by name beside one base: saved and loaded as small folders, put on and off.

A folder holds `adapter_config.json` and `adapter_model.safetensors`: the bottlenecks, and the head and norms that
learned with them. Without an active adapter a model computes exactly what its base does. Of several active ones each
bottleneck acts on what the one before it left (those that read the input of a sublayer add up), and head and norms are
those of the last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki import __version__
from niwaki.errors import ArtifactError, ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.tuning.bottleneck import AddBottlenecks, Wrapper, bottlenecks, edits_of, ends, remove, width_of
from niwaki.weights import repeats

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KIND = "BOTTLENECK"  # where PEFT's own folders have LORA and the like


@dataclass
class Shelf:
    """The adapters that can be put on and off a model, and what the base has in their place."""

    fixed: tuple[str, ...]  # adapters that are part of the base
    base: dict[str, Tensor] = field(default_factory=dict)  # head and norms without an adapter, by parameter
    own: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # the same of each adapter
    active: tuple[str, ...] = ()
    resting: tuple[str, ...] = ()  # active before `disable`


def names(model: nn.Module) -> tuple[str, ...]:
    """The adapters that can be put on and off."""
    return tuple(shelf_of(model).own)


def active(model: nn.Module) -> tuple[str, ...]:
    """The adapters that are on, in the order in which they act."""
    return shelf_of(model).active


def activate(model: nn.Module, *adapters: str) -> None:
    """Put these adapters on and all others off.

    Raises:
        ConfigError: there is no such adapter, or one is named twice.
    """
    shelf = shelf_of(model)
    for name in adapters:
        if name not in shelf.own or adapters.count(name) > 1:
            known = ", ".join(shelf.own) or "none"
            raise ConfigError(f"adapter={name!r}: needs adapters of this model, each once; it has {known}")
    parameters = dict(model.named_parameters())
    keep_current(shelf, parameters)
    for values in (shelf.base, *(shelf.own[name] for name in adapters)):
        write(parameters, values)
    let_act(model, shelf, adapters)


def disable(model: nn.Module) -> None:
    """Put all adapters off: the model computes what its base does.

    Raises:
        ConfigError: the model has none; those with which an artifact was saved are part of it.
    """
    shelf = shelf_of(model)
    if not shelf.own:
        part = f"; {', '.join(shelf.fixed)} came with the model and is part of it" if shelf.fixed else ""
        raise ConfigError(f"adapter: there is none to put off{part}")
    shelf.resting = shelf.active or shelf.resting
    activate(model)


def enable(model: nn.Module) -> None:
    """Put on again what `disable` put off."""
    shelf = shelf_of(model)
    activate(model, *(shelf.active or shelf.resting))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Without adapters inside of the `with`."""
    disable(model)
    try:
        yield
    finally:
        enable(model)


def save_adapter(model: Any, folder: Path, adapter: str | None = None) -> None:
    """Write one adapter; without a name, the one that is active.

    Raises:
        ConfigError: there is no such adapter, or it holds integers.
    """
    from safetensors.torch import save_file

    shelf = shelf_of(model)
    if adapter is None and len(shelf.active) == 1:
        adapter = shelf.active[0]
    if adapter not in shelf.own:
        raise ConfigError(
            f"adapter={adapter!r}: needs one adapter of this model; it has {', '.join(shelf.own) or 'none'}"
        )
    if shelf.active == (adapter,):
        keep_current(shelf, dict(model.named_parameters()))
    anatomy = Anatomy.of(model)
    beside = sorted(shelf.own[adapter])  # what an adapter_model.safetensors without its head would lack
    facts = {"peft_type": KIND, "niwaki": __version__, **shape_of(anatomy), "beside": beside}
    edit = {key: value for key, value in asdict(edits_of(model)[adapter]).items() if key != "adapter"}
    folder.mkdir(parents=True, exist_ok=True)
    state = {**weights(model, adapter), **shelf.own[adapter]}
    whole(folder / WEIGHTS, lambda path: save_file(contiguous(state), path, metadata={"format": "pt"}))
    whole(folder / CONFIG, lambda path: path.write_text(json.dumps(facts | edit, indent=1) + "\n", encoding="utf-8"))


def base_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of `state` is the base's, once, under the names and with the values that it has without the adapter; for a
    model all of whose adapters can be put off."""
    wrappers = {name for name, module in model.named_modules() if isinstance(module, Wrapper)}
    found, again = {}, repeats(model)
    for name, tensor in state.items():
        if name.rpartition(".")[0] in again:
            continue
        parts = name.split(".")
        outer = next((n for n in range(len(parts)) if ".".join(parts[:n]) in wrappers), None)
        if outer is None:
            found[name] = tensor
        elif parts[outer] == "linear":
            found[".".join([*parts[:outer], *parts[outer + 1 :]])] = tensor
    base = shelf_of(model).base
    return {name: contiguous(base)[name] if name in base else tensor for name, tensor in found.items()}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a bottleneck adapter, rather than one of PEFT's or none."""
    try:
        return bool(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"] == KIND)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def learned_beside(folder: Path) -> set[str]:
    """The modules, outside of the bottlenecks, whose parameters an adapter brings along: head and norms.

    Raises:
        ArtifactError: the folder's config is damaged.
    """
    try:
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return {str(name).rpartition(".")[0] for name in facts["beside"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"adapter {folder}: {CONFIG} is damaged ({error})") from error


def load_adapter(model: Any, folder: Path, adapter: str) -> AddBottlenecks:
    """Put the adapter of a folder on a model under a name, as the only active one; returns the edit that it is.

    Raises:
        ConfigError: a name that is taken or cannot be one.
        ArtifactError: no adapter, or one of another model; the model is as before.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_name(model, adapter)
    edit, beside = read_config(model, folder, adapter)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"adapter {folder}: {WEIGHTS} cannot be read ({error})") from error
    shelf = shelf_of(model)
    before = shelf.active
    activate(model)
    edit.apply(model)
    inside = weights(model, adapter)
    parameters = dict(model.named_parameters())
    room = {name: parameters[name] for name in beside if name in parameters} | inside
    odd = [name for name in {*inside, *beside, *state} if shape(room, name) != shape(state, name)]
    if odd:
        remove(model, adapter)
        activate(model, *before)
        raise ArtifactError(f"adapter {folder}: does not fit this model ({misfit(min(odd), state, room)})")
    write(inside, state)
    shelf.base = {name: parameters[name].detach().clone() for name in beside} | shelf.base
    shelf.own[adapter] = {n: state[n].to(parameters[n].device, parameters[n].dtype) for n in beside}
    activate(model, adapter)
    return edit


def remember(model: nn.Module, adapter: str) -> None:
    """Take note of an adapter that was just made, before it learns: what learns beside its bottlenecks is its own."""
    shelf = shelf_of(model)
    shelf.fixed = tuple(name for name in shelf.fixed if name != adapter)
    inside = {id(p) for bottleneck in bottlenecks(model, adapter).values() for p in bottleneck.parameters()}
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    shelf.base = {name: parameter.detach().clone() for name, parameter in learning.items()} | shelf.base
    shelf.own[adapter] = {name: parameter.detach().clone() for name, parameter in learning.items()}
    let_act(model, shelf, (adapter,))


def let_act(model: nn.Module, shelf: Shelf, adapters: tuple[str, ...]) -> None:
    """Set which bottlenecks act, beside those that are part of the base."""
    for _, end in ends(model):
        end.active = tuple(name for name in (*shelf.fixed, *adapters) if name in end.adapter)
    shelf.active = adapters


def shelf_of(model: Any) -> Shelf:
    """The shelf of a model; adapters that were there before it are part of the base."""
    found: Shelf = model.__dict__.setdefault("adapter_shelf", Shelf(tuple(edits_of(model))))
    return found


def keep_current(shelf: Shelf, parameters: Mapping[str, Tensor]) -> None:
    """Head and norms as they are now belong to the one active adapter; with several they do not change."""
    if len(shelf.active) == 1:
        own = shelf.own[shelf.active[0]]
        own |= {name: parameters[name].detach().clone() for name in own}


def write(places: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of the same names."""
    with torch.no_grad():
        for name in values.keys() & places.keys():
            places[name].copy_(values[name])


def weights(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter's bottlenecks, by names without the adapter's own.

    Raises:
        ConfigError: they are integers.
    """
    found: dict[str, Tensor] = {}
    for name, bottleneck in bottlenecks(model, adapter).items():
        for part, linear in (("down", bottleneck.down), ("up", bottleneck.up)):
            if not isinstance(linear, nn.Linear):
                raise ConfigError(
                    f"adapter={adapter!r}: {name} holds integers, and a folder holds none; save it before"
                )
            found |= {f"{name}.adapter.{part}.{kind}": getattr(linear, kind).detach() for kind in ("weight", "bias")}
    return found


def shape_of(anatomy: Anatomy) -> dict[str, Any]:
    """What an adapter asks of its model before names are compared."""
    kind = anatomy.model.config.model_type  # type: ignore[union-attr]
    return {"model_type": kind, "blocks": len(anatomy.blocks), "width": width_of(anatomy)}


def check_name(model: nn.Module, adapter: str) -> None:
    """Raise ConfigError unless a new adapter can bear this name."""
    if adapter in edits_of(model):
        raise ConfigError(f"adapter={adapter!r}: the model has one of that name; choose another")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", adapter) or hasattr(nn.ModuleDict(), adapter):
        raise ConfigError(f"adapter={adapter!r}: needs letters, digits, - and _, and no word that torch uses itself")


def read_config(model: Any, folder: Path, adapter: str) -> tuple[AddBottlenecks, list[str]]:
    """The edit that a folder describes, for a model of this shape, and what learned beside the bottlenecks.

    Raises:
        ArtifactError: there is none, it is damaged, or made for another model.
    """
    if not is_adapter(folder):
        raise ArtifactError(f"adapter {folder}: needs a folder with an {CONFIG} of the kind {KIND}")
    facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for key, here in shape_of(Anatomy.of(model)).items():
        if facts.pop(key, None) != here:
            raise ArtifactError(f"adapter {folder}: its model has another {key} than this one, which has {here}")
    try:
        del facts["peft_type"], facts["niwaki"]
        beside = [str(name) for name in facts.pop("beside")]
        return AddBottlenecks(**{**facts, "adapter": adapter}), beside
    except (ConfigError, TypeError, KeyError) as error:
        raise ArtifactError(f"adapter {folder}: {CONFIG} is damaged ({error})") from error


def shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    """The shape of a tensor; None where there is none."""
    return tensors[name].shape if name in tensors else None


def misfit(name: str, state: Mapping[str, Tensor], room: Mapping[str, Tensor]) -> str:
    """What is wrong with one tensor, in words."""
    theirs, ours = ("none" if s is None else str(list(s)) for s in (shape(state, name), shape(room, name)))
    return f"{name}: {theirs} in the file, {ours} in the model"


def contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as a file takes it."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def whole(path: Path, write_to: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    write_to(partial)
    os.replace(partial, path)
