"""What an export is: the artifact in a file of another runtime, which is judged by what it then answers."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from niwaki.compression.quantize.kernels import FLOAT_ORDER
from niwaki.errors import ConfigError, UserError
from niwaki.naming import option_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from niwaki.artifact import Artifact
    from niwaki.export.runner import Runner
    from niwaki.model.anatomy import Anatomy
    from niwaki.stage import Stage
    from niwaki.task.task import Task


FLIPPED = 0.1  # off by, of the largest logit: the worst answer, where the order of a sum decides how inputs are rounded


class ExportError(UserError):
    """A file that does not say what the artifact says, or cannot be made."""


@dataclass(frozen=True, kw_only=True)
class Export(abc.ABC):
    """One format. It holds settings only."""

    paper: ClassVar[str]  # where the format is from
    texts: ClassVar[bool] = False  # whether it can do every task that writes texts
    packages: ClassVar[tuple[str, ...]] = ()  # that have to be installed
    extra: ClassVar[str] = ""  # of niwaki, which brings them

    @property
    def name(self) -> str:
        """`onnx`: the option that selects this format, which is where its file stands."""
        return option_name(self)

    def check(self, task: Task, anatomy: Anatomy) -> None:
        """Raise ConfigError where such a model of such a task cannot be exported, or a package is missing; the model
        may be empty (meta device)."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(f"export={self.name}: needs {missing[0]}; pip install 'niwaki[{self.extra}]'")
        if task.writes and not (self.texts or task.name == "causal_lm"):
            raise ConfigError(
                f"export={self.name}: task={task.name} writes texts by a decoder with a cache, for which this format "
                "has no graphs; export=onnx and export=hf can"
            )

    def conflict(self, stages: Sequence[Stage]) -> str | None:
        """The reason why what these stages make of a model cannot be exported, or None."""
        return None

    @abc.abstractmethod
    def write(self, saved: Artifact, example: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write the model of an artifact, which may be changed, to a folder that is there; what `export.json` says of
        it. `example`: two rows as the model reads them."""

    @abc.abstractmethod
    def runner(self, folder: Path) -> Runner:
        """What was written, loaded by its own runtime."""

    def bound(self, model: nn.Module) -> float | None:
        """How far logits may be off, of the largest one where that is above 1, each less the mean of its position; None
        where only the scores count."""
        return FLIPPED if rounds_inputs(model) else FLOAT_ORDER

    def loss_allowed(self, model: nn.Module) -> float | None:
        """What share of the task's metric may be lost on the test rows; None where the logits count."""
        return None


def rounds_inputs(model: nn.Module) -> bool:
    """Whether a linear of an artifact rounds what it reads."""
    from niwaki.weights import packed

    return any(module.rounds_inputs for _, module in packed(model))
