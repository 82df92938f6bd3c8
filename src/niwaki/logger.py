"""Where a run is logged: Weights & Biases, csv, TensorBoard, or nowhere."""

from __future__ import annotations

import abc
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from niwaki.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoggerSettings(abc.ABC):
    """Settings of one logger."""

    @abc.abstractmethod
    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        """The Lightning logger of a run in `folder`, or None."""

    def finish(self, logger: Logger | None, folder: Path, metrics: Mapping[str, Any]) -> None:
        """After the run: log the numbers before and after, and close."""
        if logger is not None:
            logger.log_metrics(numbers(metrics))
            logger.finalize("success")


@dataclass(frozen=True, kw_only=True)
class NoLogger(LoggerSettings):
    """Nothing but the run folder."""

    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Csv(LoggerSettings):
    """`steps.csv` in the run folder."""

    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        from pytorch_lightning.loggers import CSVLogger

        return CSVLogger(folder, name="", version="csv")


@dataclass(frozen=True, kw_only=True)
class TensorBoard(LoggerSettings):
    """TensorBoard event files in the run folder."""

    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        from pytorch_lightning.loggers import TensorBoardLogger

        try:
            return TensorBoardLogger(folder, name="", version="tensorboard")
        except ModuleNotFoundError as error:
            raise ConfigError("logger=tensorboard: needs a package; pip install 'niwaki[tensorboard]'") from error


@dataclass(frozen=True, kw_only=True)
class Wandb(LoggerSettings):
    """Weights & Biases; offline unless the user is logged in, and never a prompt. `upload_artifact`: the model too."""

    project: str = "niwaki"
    upload_artifact: bool = False

    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        run = wandb.init(
            project=self.project, name=folder.name, dir=folder, mode=mode, config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        return WandbLogger(experiment=run)

    def finish(self, logger: Logger | None, folder: Path, metrics: Mapping[str, Any]) -> None:
        import wandb

        run: Any = logger.experiment  # type: ignore[union-attr]
        run.summary.update(numbers(metrics))
        if (folder / "report.png").is_file():
            columns: list[Any] = ["", "before", "after"]
            before, after = numbers(metrics.get("before") or {}), numbers(metrics["after"])
            rows = [[name, before.get(name), value] for name, value in after.items()]
            run.log(
                {"report": wandb.Image(str(folder / "report.png")), "table": wandb.Table(columns=columns, data=rows)}
            )
        if self.upload_artifact:
            run.log_model(str(folder / "model"), name=f"{metrics['task']}-{run.id}")
        run.finish()


def logged_in() -> bool:
    """Whether a key for Weights & Biases is at hand, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested mapping under dotted names."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in ("targets", "per_class", "averages"):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found
