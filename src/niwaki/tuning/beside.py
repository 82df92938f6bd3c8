"""Adapters that stay beside their base: a folder of their own, and base weights as they were.

The folder of adapters that PEFT injects is in PEFT's own format (BOFT alone is always merged): `remember` in `prepare`,
`leave` in `finalize`, `conflict` in `conflict`. That of bottlenecks is written and read by `bottleneck_folder`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from niwaki.edits import Edit
from niwaki.errors import ArtifactError, ConfigError
from niwaki.naming import is_plain
from niwaki.stage import Context, Stage
from niwaki.tuning import bottleneck_folder
from niwaki.tuning.bottleneck import free_name

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor in PEFT's file


def conflict(name: str, others: Sequence[Stage]) -> str | None:
    """Why tuning `name` cannot keep its adapters beside the base together with one of `others`, or None."""
    weight = next((other for other in others if other.phase.acts_on_weights), None)
    if weight is None:
        return None
    if not weight.acts_on_linears:
        return (
            f"tuning={name} with tuning.merge=false and {weight.name}: PEFT reads the base beside the adapter, and no "
            "embeddings that are integers; set tuning.merge=true"
        )
    return (
        f"tuning={name} with tuning.merge=false and {weight.name}: masks and grids act on the sum of base and adapter, "
        "which is not formed where the two stay apart; set tuning.merge=true"
    )


def refuse_tied_head(model: Any, context: Context) -> None:
    """Raise ConfigError where a new head would have to stand beside the base and is tied to its embeddings."""
    if context.new_head and model.get_output_embeddings() is not None:
        raise ConfigError(
            "tuning.merge=false: the model came without a head for this task, and the new one is tied to its embeddings"
            ", so it cannot stand beside them; set tuning.merge=true"
        )


def remember(model: nn.Module, context: Context) -> None:
    """Before the fit, with the adapters on: keep what else will learn (a new head) as it is."""
    inside = {id(p) for layer in adapter_layers(model).values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            context.kept[name] = parameter.detach().clone()


def leave(model: nn.Module, context: Context) -> list[Edit]:
    """After the fit: leave the adapters on; what else learned becomes theirs, and the base is again as it was."""
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    from niwaki.tuning.delta import ADAPTER
    from niwaki.weights import replace_module

    owners = sorted({name.rpartition(".")[0] for name in context.kept})
    for owner in owners:
        wrapper = ModulesToSaveWrapper(model.get_submodule(owner), ADAPTER)
        with torch.no_grad():
            for name, parameter in wrapper.original_module.named_parameters(recurse=False):
                parameter.copy_(context.kept.get(f"{owner}.{name}", parameter))
        replace_module(model, owner, wrapper)
    config_of(model).modules_to_save = owners or None
    return [UseAdapter(folder=FOLDER, base=fingerprint(base_state(model, model.state_dict()), owners))]


@dataclass(frozen=True, kw_only=True)
class UseAdapter(Edit):
    """The adapter of a folder beside the base weights stands on the model. `base`: the fingerprint of these."""

    carried: ClassVar[bool] = False  # another training starts from the merged weights

    folder: str
    base: str

    def apply(self, model: nn.Module) -> None:
        """Nothing: an adapter goes on a base that has its weights."""
        if not is_plain(self.folder):
            raise ValueError(f"the adapter's folder {self.folder!r} is no plain name")

    def set_aside(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        if bottleneck_folder.names(model):
            bottleneck_folder.save_adapter(model, folder / self.folder)
            return bottleneck_folder.base_state(model, state)
        write(model, folder / self.folder)
        return base_state(model, state)

    def complete(self, model: nn.Module, folder: Path) -> None:
        put_on(model, folder / self.folder)

    def merge(self, model: nn.Module) -> None:
        from niwaki.tuning.delta import unload

        if not bottleneck_folder.names(model):  # those are layers, which no weight can hold
            unload(model)


def config_of(model: Any) -> Any:
    """PEFT's config of the adapters on a model."""
    from niwaki.tuning.delta import ADAPTER

    return model.peft_config[ADAPTER]


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the modules whose tensors are an adapter's, but for those of the base layer inside."""
    from niwaki.tuning.delta import adapters

    return {name: layer for name, layer in adapters(model)}  # type: ignore[misc]


def base_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of `state` is the base's, once, under the names that it has without adapters."""
    from peft.utils.other import ModulesToSaveWrapper

    from niwaki.weights import repeats

    again = repeats(model)

    inner = dict.fromkeys(adapter_layers(model), "base_layer")
    inner |= {name: "original_module" for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    found = {}
    for name, tensor in state.items():
        if name.rpartition(".")[0] in again:
            continue
        parts = name.split(".")
        outer = next((n for n in range(len(parts)) if ".".join(parts[:n]) in inner), None)
        if outer is None:
            found[name] = tensor
        elif parts[outer] == inner[".".join(parts[:outer])]:
            found[".".join([*parts[:outer], *parts[outer + 1 :]])] = tensor
    return found


def fingerprint(state: Mapping[str, Tensor], heads: Collection[str]) -> str:
    """sha256 of the base weights but those of `heads`, which every adapter brings along."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        if name.rpartition(".")[0] not in heads:
            tensor = state[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(model: nn.Module, folder: Path) -> None:
    """The adapter of a model as `peft.PeftModel.from_pretrained` reads it."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from niwaki.tuning.delta import ADAPTER

    folder.mkdir()
    if hasattr(config_of(model), "save_projection"):  # VeRA's shared projections: drawn again from their seed, since
        config_of(model).save_projection = False  # PEFT finds them in a model of its own class only
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    state = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"} | drawn_record(model))
    settings = config_of(model).to_dict() | {"inference_mode": True, "base_model_name_or_path": hub_name(model)}
    if isinstance(settings.get("init_lora_weights"), str):
        settings["init_lora_weights"] = True  # what such a start took from the base is no longer in the saved one
    text = json.dumps(settings, indent=1, sort_keys=True, default=sorted) + "\n"  # sets of names
    (folder / CONFIG).write_text(text, encoding="utf-8")


DRAWN = ("vera_A", "vera_B", "indices")  # what a layer draws from a seed, and PEFT's file does not hold
RECORD = "drawn_sha256"


def drawn_record(model: nn.Module) -> dict[str, str]:
    """For the header of the file: the digest of what was drawn, where something was. Another machine, or version of
    torch, may draw other numbers from the same seed."""
    from niwaki.tuning.delta import ADAPTER

    found = {}
    for place, layer in adapter_layers(model).items():
        for name in DRAWN:
            held: Any = getattr(layer, name, {})
            if ADAPTER in held:
                found[f"{place}.{name}"] = held[ADAPTER]
    return {RECORD: fingerprint(found, ())} if found else {}


def check_drawn(model: nn.Module, folder: Path) -> None:
    """Raise ArtifactError where this machine drew other numbers than those that the adapter learned with."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        told = (file.metadata() or {}).get(RECORD)
    if told and told != drawn_record(model).get(RECORD):
        raise ArtifactError(
            f"adapter {folder}: what it draws from its seed came out different here than where it was trained; "
            "use the machine and the torch of the training, or train with tuning.merge=true"
        )


def hub_name(model: Any) -> str | None:
    """The hub name that the base was loaded by; None for folders, which are of one machine."""
    name = getattr(model.config, "_name_or_path", None) or ""
    return name if name and not Path(name).is_absolute() and not Path(name).exists() else None


def put_on(model: Any, folder: Path) -> None:
    """Put the adapter of a folder on a base that has its weights.

    Raises:
        ArtifactError: the folder holds no adapter that fits; the model may then be half changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if bottleneck_folder.is_adapter(folder):
        bottleneck_folder.load_adapter(model, folder, free_name(model))
        return
    config = read_config(folder)
    try:
        state = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"adapter {folder}: needs {WEIGHTS} of PEFT ({error})") from error
    theirs = config.base_model_name_or_path
    ours = hub_name(model)
    if ours and theirs and theirs != ours and not Path(theirs).is_absolute():
        raise ArtifactError(f"adapter {folder}: was made for the base {theirs}, this one is {ours}")
    heads = tuple(f"{name}." for name in config.modules_to_save or ())
    config.modules_to_save = None  # in place: a model that is used holds one head
    head = {name: state.pop(name) for name in list(state) if name.startswith(heads)}
    check_shapes(model, head, folder)
    inject(model, config, folder)
    load(model, state, folder)
    check_drawn(model, folder)
    model.load_state_dict(head, strict=False)
    model.requires_grad_(False)


def learned_beside(folder: Path) -> Collection[str]:
    """The modules that an adapter brings along whole, beside its own layers: the head."""
    if bottleneck_folder.is_adapter(folder):
        return bottleneck_folder.learned_beside(folder)
    return read_config(folder).modules_to_save or ()


def read_config(folder: Path) -> Any:
    """PEFT's config of a folder, as data: nothing that it names is imported or fetched.

    Raises:
        ArtifactError: there is none, or it is of no kind of adapter that stands on layers.
    """
    from peft import get_peft_config

    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save vera_A")
            harmless = {name: None for name in ("megatron_config",) if name in settings}  # names a module to import
            config = get_peft_config(settings | {"inference_mode": True} | harmless)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArtifactError(f"adapter {folder}: needs {CONFIG} of PEFT ({reason})") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ArtifactError(f"adapter {folder}: {settings['peft_type']} does not stand on layers of the base")
    return config


def inject(model: nn.Module, config: Any, folder: Path) -> None:
    """Adapters on the layers that the config names, their values still random."""
    from niwaki.tuning import delta

    try:
        delta.inject(model, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"adapter {folder}: cannot be put on this base ({reason})") from error


def load(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Fill the adapters of a model; every tensor must be there, and no other."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from niwaki.tuning.delta import ADAPTER

    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    odd = sorted(expected.keys() ^ state.keys())
    if odd:
        side = "lacks" if odd[0] in expected else "has a tensor that this base has no place for,"
        raise ArtifactError(f"adapter {folder}: {side} {odd[0]}")
    refuse_other_shapes(expected, state, folder)
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)


def check_shapes(model: nn.Module, head: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a head that the base has no place for."""
    own = model.state_dict()
    strange = [name for name in head if name not in own]
    if strange:
        raise ArtifactError(f"adapter {folder}: was made for another task: this base has no {strange[0]}")
    refuse_other_shapes(own, head, folder)


def refuse_other_shapes(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ArtifactError for the first tensor of `theirs` that is of another shape than it has in `own`."""
    for name, tensor in theirs.items():
        if own[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            raise ArtifactError(f"adapter {folder}: does not fit this base: {name} is {shapes}")
