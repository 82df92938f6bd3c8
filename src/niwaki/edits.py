"""Changes that a saved model needs beyond its config: an artifact replays them, in order, before it loads weights."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit(abc.ABC):
    """One change of a model's structure, small enough to stand in JSON."""

    carried: ClassVar[bool] = True
    """Whether a model that starts from the artifact takes this edit over: not one that its config tells of already,
    nor one that is undone there."""

    @abc.abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Make the change in place, on a model that may be on the meta device."""

    def set_aside(self, model: nn.Module, state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """At save: write what has files of its own into a folder below `folder`; return the rest of `state`."""
        return state

    def complete(self, model: nn.Module, folder: Path) -> None:
        """At load, when the model has its weights: read what `set_aside` wrote."""
        return None

    def merge(self, model: nn.Module) -> None:
        """Bring what this edit added to a dense model into its weights, where that can be."""
        return None

    def to_json(self) -> dict[str, Any]:
        """`{"edit": "<module>:<class>", ...fields}`."""
        return {"edit": f"{type(self).__module__}:{type(self).__name__}", **dataclasses.asdict(self)}


def from_json(record: dict[str, Any]) -> Edit:
    """The edit that `to_json` wrote.

    Raises:
        ArtifactError: the record names something else than an edit of this project.
    """
    from niwaki.allow import resolve
    from niwaki.errors import ArtifactError

    try:
        fields = dict(record)
        kind = resolve(str(fields.pop("edit", "")).replace(":", "."), (Edit,))
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"niwaki.json: edits: {error}") from error
