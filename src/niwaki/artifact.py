"""The artifact: what a run leaves for use. A folder with `niwaki.json`, weights, config and tokenizer.

The weights are in `model.safetensors`, or in `compact.safetensors` where tensors are stored without their zeros: under
another name, since `from_pretrained` would take what it cannot read for missing and make it random. `niwaki.json` holds
the task, the labels, the config that the model started from, the ordered edits that made its structure, and a checksum
of every other file. Nothing in it is executable, and no pickle is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from niwaki import __version__, storage
from niwaki.edits import Edit, from_json
from niwaki.errors import ArtifactError, UserError
from niwaki.naming import is_plain
from niwaki.weights import Packed, to_dense

if TYPE_CHECKING:
    from niwaki.task.task import Task

SCHEMA = 1
WEIGHTS = "model.safetensors"
COMPACT = "compact.safetensors"  # the same tensors, some of them without their zeros
LEAST_SAVED = 0.1  # of the bytes, for a file that `from_pretrained` could read otherwise
CARD = "niwaki.json"
FIELDS = {"task": str, "task_settings": dict, "labels": list, "base_config": dict, "edits": list}


@dataclass(frozen=True)
class Artifact:
    """A saved model, loaded and ready to run."""

    folder: Path
    model: Any
    tokenizer: Any
    task: Task
    labels: tuple[str, ...]
    base_config: dict[str, Any]
    edits: tuple[Edit, ...]
    columns: tuple[str, ...] = ()  # of the rows that it was trained on; empty where that is not known


def is_artifact(place: str | Path) -> bool:
    """Whether `place` is a folder that holds an artifact."""
    return (Path(place) / CARD).is_file()


def save(
    folder: Path, *, model: Any, tokenizer: Any, task: Task, labels: Sequence[str],
    base_config: dict[str, Any], edits: Sequence[Edit], columns: Sequence[str] = (),
    store: Literal["auto", "dense"] = "dense",
) -> None:  # fmt: skip
    """Write the artifact; `folder` appears whole or not at all. `columns`: those of the rows that it was trained on.
    `store=auto` leaves zeros out of the file where that makes it smaller."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        state = unique_tensors(model)
        for edit in reversed(edits):
            state = edit.set_aside(model, state, partial)
        beside = any(partial.iterdir())  # what other programs put on the base, which they read too
        write_weights(model, state, partial, "dense" if beside else store)
        save_settings(model, tokenizer, partial)
        card = {
            "schema": SCHEMA,
            "niwaki": __version__,
            "task": f"{type(task).__module__}:{type(task).__name__}",
            "task_settings": asdict(task),
            "labels": list(labels),
            "columns": list(columns),
            "base_config": base_config,
            "edits": [edit.to_json() for edit in edits],
            "files": {
                path.relative_to(partial).as_posix(): stamp(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            },
        }
        (partial / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(folder: str | Path, *, base_alone: bool = False) -> Artifact:
    """Verify the artifact, rebuild its structure, load its weights. fp32 or integers, on the CPU, in eval mode.
    `base_alone` leaves out what is saved beside the weights: adapters.

    Raises:
        ArtifactError: missing, truncated or altered files, or a card that does not fit the weights.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    card = read_card(folder)
    task = task_of(card)
    edits = tuple(from_json(record) for record in card["edits"])
    model = rebuild(card["base_config"], edits, task, folder, card["labels"])
    fill(model, storage.read(weights_of(folder)), folder)
    for edit in () if base_alone else edits:
        edit.complete(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return Artifact(
        folder, model.eval(), tokenizer, task, tuple(card["labels"]), card["base_config"], edits,
        tuple(card.get("columns", ())),
    )  # fmt: skip


def write_weights(model: nn.Module, state: dict[str, Tensor], folder: Path, store: str) -> None:
    """Write the weights: without zeros where `store` is auto and that saves what it has to, else as they are."""
    forms = storage.choose(state, code_streams(model)) if store == "auto" else {}
    stored = storage.encode(state, forms)
    packed = any(isinstance(module, Packed) for module in model.modules())  # nothing that `from_pretrained` reads
    if forms and (packed or storage.size(stored) <= (1 - LEAST_SAVED) * storage.size(state)):
        storage.write(stored, folder / COMPACT, forms)
    else:
        storage.write(state, folder / WEIGHTS, {})


def save_settings(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write everything but the weights as transformers does."""
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def code_streams(model: nn.Module) -> dict[str, int]:
    """Bits of a code in the tensors that hold codes of fewer than 8 bits, one behind the other."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    streams = {name: getattr(module, "codes", None) for name, module in packed.items()}
    return {
        f"{name}.codes": packed[name].bits
        for name, codes in streams.items()
        if codes is not None and codes.dtype is torch.uint8 and codes.dim() == 1 and packed[name].bits < 8
    }


def weights_of(folder: Path) -> Path:
    """The file with the weights of an artifact, without a look into it."""
    return folder / (COMPACT if (folder / COMPACT).is_file() else WEIGHTS)


def rebuild(base_config: dict[str, Any], edits: Sequence[Edit], task: Task, folder: Path, labels: Sequence[str]) -> Any:
    """The structure of the model: its first config, then the edits in their order. Its weights are random."""
    from transformers import AutoConfig

    from niwaki.model.load import auto_class

    try:
        settings = dict(base_config)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = auto_class(task, config).from_config(config, dtype=torch.float32)
        task.attach(model, labels)
        for edit in edits:
            edit.apply(model)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ArtifactError(f"artifact {folder}: {CARD} describes no model that can be built ({reason})") from error
    return model


def read_card(folder: Path) -> dict[str, Any]:
    """`niwaki.json`, after a check of every file against it.

    Raises:
        ArtifactError: no artifact, a file missing, truncated, altered or not listed, or another schema.
    """
    card = parse_card(folder)
    for name, facts in card["files"].items():
        path = folder / name
        if not is_inside(name) or not path.is_file():
            raise ArtifactError(f"artifact {folder}: the file {name} is missing")
        if path.stat().st_size != facts["bytes"]:
            raise ArtifactError(
                f"artifact {folder}: {name} is truncated or altered ({path.stat().st_size} bytes, not {facts['bytes']})"
            )
        if checksum(path) != facts["sha256"]:
            raise ArtifactError(f"artifact {folder}: {name} was altered (its checksum is not the one in {CARD})")
    known = {CARD, *card["files"], *(name.partition("/")[0] for name in card["files"])}
    foreign = sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} - known)
    if foreign:
        raise ArtifactError(f"artifact {folder}: {foreign[0]} is not listed in {CARD}; move it elsewhere")
    return card


def is_inside(name: str) -> bool:
    """Whether a file of that name lies in the artifact's folder, or in a folder in it."""
    parts = name.split("/")
    return len(parts) <= 2 and all(map(is_plain, parts))


def weight_bytes(folder: Path) -> int:
    """Bytes of all the weights that an artifact holds, adapters beside the base included."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def parse_card(folder: Path) -> dict[str, Any]:
    """`niwaki.json`, without a look at the other files.

    Raises:
        ArtifactError: no artifact, a damaged card, or another schema.
    """
    if not is_artifact(folder):
        raise ArtifactError(f"artifact {folder}: needs a folder that holds {CARD}")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        schema = card["schema"]
        listed = {name for name, facts in card["files"].items() if {"bytes", "sha256"} <= facts.keys()}
        kinds = [isinstance(card[name], kind) for name, kind in FIELDS.items()] if schema == SCHEMA else []
        if not all(kinds) or listed != set(card["files"]) or not isinstance(card.get("columns", []), list):
            raise TypeError("a field is of the wrong kind")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"artifact {folder}: {CARD} is damaged ({error})") from error
    if schema != SCHEMA:
        raise ArtifactError(f"artifact {folder}: schema {schema}, this version reads {SCHEMA}")
    if len(listed & {WEIGHTS, COMPACT}) != 1:
        raise ArtifactError(f"artifact {folder}: {CARD} names no {WEIGHTS}, or another file of weights beside it")
    return card


def task_of(card: dict[str, Any]) -> Task:
    """The task that the artifact was made for, with its settings."""
    from niwaki.allow import resolve
    from niwaki.task.task import Task

    try:
        return resolve(card["task"].replace(":", "."), (Task,))(**card["task_settings"])
    except (UserError, TypeError, KeyError) as error:
        raise ArtifactError(f"{CARD}: task: {error}") from error


def fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Load every tensor; what the file leaves out must be tied to something that it holds."""
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"artifact {folder}: the weights do not fit the structure ({reason})") from error
    present = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name in state}
    firsts = first_names(model)
    lacking = [n for n in result.missing_keys if firsts.get(n, n) not in state]
    missing = [n for n in lacking if model.state_dict()[n].data_ptr() not in present]
    if missing or result.unexpected_keys:
        odd = [*missing, *result.unexpected_keys][0]
        raise ArtifactError(f"artifact {folder}: {weights_of(folder).name} does not fit the structure ({odd})")


def load_merged(folder: str | Path) -> Artifact:
    """The artifact with dense weights: codes as the weights that they stand for, adapters merged."""
    return merge(load(folder))


def merge(saved: Artifact) -> Artifact:
    """The same artifact, its codes as the weights that they stand for, its adapters merged."""
    to_dense(saved.model)
    for edit in saved.edits:
        edit.merge(saved.model)
    return saved


def load_dense(place: str, task: Task, labels: Sequence[str], config: Any) -> tuple[nn.Module, set[str]]:
    """An artifact as the start of another training, and the names of the tensors that it lacks or has in another shape:
    integers become fp32 weights again, adapters are merged, layers that grew stay; a head for another task or other
    labels is left behind for a fresh one.

    Raises:
        ArtifactError: it holds what the new model has no place for.
        ConfigError: it would not be read as it was.
    """
    from niwaki.model.anatomy import Anatomy, adapt
    from niwaki.model.load import auto_class, with_labels

    saved = load_merged(place)
    task.refuse_start(saved.task)
    fresh = auto_class(task, config).from_config(with_labels(config, task.outputs(labels)), dtype=torch.float32)
    task.attach(fresh, labels)
    adapt(fresh)
    for edit in saved.edits:
        if edit.carried:
            edit.apply(fresh)
    same = saved.task.alike(task) and saved.labels == tuple(labels)
    if same and getattr(saved.model, "generation_config", None) is not None:
        fresh.generation_config = saved.model.generation_config
    source, prefix = (saved.model, "") if same else (saved.model.base_model, Anatomy.of(fresh).prefix)
    stored = {f"{prefix}{name}": tensor for name, tensor in tensors(source).items()}
    places = tensors(fresh)
    homeless = set(stored) - set(places) - set(Anatomy.of(saved.model).head_parameters())
    if homeless:
        raise ArtifactError(
            f"artifact {place}: holds {min(homeless)}, which another training has no place for; start from the model "
            "that it was tuned from"
        )
    fitting = [name for name, place in places.items() if name in stored and stored[name].shape == place.shape]
    with torch.no_grad():
        for name in fitting:
            places[name].copy_(stored[name])
    return fresh, set(places) - set(fitting)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as the modules hold them, which a state dict may show in another layout."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def carried(folder: Path) -> list[Edit]:
    """The edits of an artifact that a model which starts from it takes over, in order."""
    return [edit for edit in map(from_json, parse_card(folder)["edits"]) if edit.carried]


def first_names(model: nn.Module) -> dict[str, str]:
    """By each name of a parameter or buffer, the first one that it has: a block that runs twice has every name twice,
    and its state dict may hold a copy under each."""
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors(model).items()}


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model, tied tensors once, contiguous, on the CPU."""
    seen: set[tuple[int, torch.Size]] = set()
    state, firsts = {}, first_names(model)
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if firsts.get(name, name) != name or (tensor.numel() and key in seen):
            continue
        seen.add(key)
        state[name] = tensor.detach().cpu().contiguous()
    return state


def stamp(path: Path) -> dict[str, Any]:
    """What the card says of a file."""
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def checksum(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
