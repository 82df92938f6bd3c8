"""An artifact as a plain folder: dense weights that `from_pretrained` of transformers reads, and nothing of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from niwaki import artifact, storage
from niwaki.errors import ArtifactError
from niwaki.weights import repeats

if TYPE_CHECKING:
    from niwaki.task.task import Task


def unpack(place: Path, folder: Path) -> Path:
    """Write the model of an artifact to `folder`, which appears whole or not at all: zeros as zeros, integers as the
    weights that they stand for, adapters merged.

    Raises:
        ArtifactError: `folder` exists, or the model has layers or shapes that no config of transformers tells of.
    """
    if folder.exists():
        raise ArtifactError(f"unpack {folder}: exists already; name a folder that does not")
    saved = artifact.load_merged(place)
    refuse_foreign(saved, f"unpack {folder}: ")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(saved, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return partial.rename(folder)


def write(saved: artifact.Artifact, folder: Path) -> None:
    """Write a dense model, its settings and its tokenizer. A block that runs several times is written as often."""
    again = repeats(saved.model)
    copies = {
        name: tensor.clone() for name, tensor in saved.model.state_dict().items() if name.rpartition(".")[0] in again
    }
    storage.write({**artifact.unique_tensors(saved.model), **copies}, folder / artifact.WEIGHTS, {})
    artifact.save_settings(saved.model, saved.tokenizer, folder)


def shapes_of_plain(model: Any, task: Task) -> dict[str, torch.Size]:
    """The tensors of the model that transformers builds from the config of `model`."""
    from niwaki.model.load import auto_class

    with torch.device("meta"):
        plain: Any = auto_class(task, model.config).from_config(model.config)
    return {name: tensor.shape for name, tensor in plain.state_dict().items()}


def foreign_names(model: Any, task: Task) -> list[str]:
    """The tensors of a model, which may be empty, that a plain one has no place for, whatever their shape."""
    return sorted(model.state_dict().keys() - shapes_of_plain(model, task).keys())


def foreign_shapes(model: Any, task: Task) -> list[str]:
    """The tensors of a model, which may be empty, whose shapes are not those that its config tells of."""
    theirs = shapes_of_plain(model, task)
    return sorted(name for name, tensor in model.state_dict().items() if theirs.get(name) != tensor.shape)


def refuse_foreign(saved: artifact.Artifact, what: str) -> None:
    """Raise ArtifactError unless the config of the model makes a model with the same tensors; `what` begins it."""
    ours = {name: tensor.shape for name, tensor in saved.model.state_dict().items()}
    theirs = shapes_of_plain(saved.model, saved.task)
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        kind, edits = saved.model.config.model_type, ", ".join(type(edit).__name__ for edit in saved.edits)
        raise ArtifactError(
            f"{what}{odd[0]} is not what a plain {kind} has there (edits: {edits}), so only niwaki reads this artifact"
        )
