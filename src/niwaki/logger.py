"""Where a run is logged: Weights & Biases, csv, TensorBoard, or nowhere."""

from __future__ import annotations

import abc
import itertools
import netrc
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger

from niwaki.errors import ConfigError

INIT_TIMEOUT = 30  # seconds to wait for Weights & Biases before the run is logged offline


@dataclass(frozen=True, kw_only=True)
class LoggerSettings(abc.ABC):
    """Settings of one logger."""

    @abc.abstractmethod
    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        """The Lightning logger of a run in `folder`, or None."""

    def finish(self, logger: Logger | None, folder: Path, metrics: Mapping[str, Any]) -> None:
        """After the run: log the numbers before and after, and close."""
        if logger is not None:
            logger.log_metrics(numbers(metrics), step=metrics.get("steps"))
            logger.finalize("success")


@dataclass(frozen=True, kw_only=True)
class NoLogger(LoggerSettings):
    """Nothing but the run folder."""

    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Csv(LoggerSettings):
    """`csv/metrics.csv` in the run folder; a run that is gone on with writes to `csv-2/metrics.csv` and so on."""

    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        from pytorch_lightning.loggers import CSVLogger

        places = (f"csv-{count}" if count > 1 else "csv" for count in itertools.count(1))
        free = next(place for place in places if not (folder / place).exists())  # Lightning would empty one in use
        return CSVLogger(folder, name="", version=free, flush_logs_every_n_steps=1)


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
    """Weights & Biases; offline unless the user is logged in, and never a prompt. `upload_artifact`: the model too.

    A run that is gone on with is the same run there: its id is kept in the run folder. Offline each part has a folder
    of its own under `wandb/`, with that id; `wandb sync --append` joins them.
    """

    project: str = "niwaki"
    upload_artifact: bool = False

    def build(self, folder: Path, config: Mapping[str, Any]) -> Logger | None:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        mode = wandb_mode()
        try:
            run = self._run(folder, config, mode)
        except (wandb.errors.Error, OSError) as error:
            if mode != "online":
                raise ConfigError(f"logger=wandb: {one_line(error)}") from error
            say_offline(one_line(error))
            wandb.teardown()  # it holds the id of the run that failed
            run = self._run(folder, config, "offline")
        return WandbLogger(experiment=run)

    def _run(self, folder: Path, config: Mapping[str, Any], mode: Any) -> Any:
        import wandb

        return wandb.init(
            project=self.project, name=folder.name, dir=folder, mode=mode, config=dict(config), id=run_id(folder),
            resume="allow" if mode == "online" else None, reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT),
        )  # fmt: skip

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


def run_id(folder: Path) -> str:
    """The id of the run in `folder` on Weights & Biases, made where there is none."""
    kept = folder / "wandb-run-id"
    if not kept.is_file():
        made = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]  # set where a sweep's agent starts the run
        kept.write_text(f"{made}\n", encoding="utf-8")
    return kept.read_text(encoding="utf-8").strip()


def wandb_mode() -> Any:
    """What WANDB_MODE asks for, else online; offline where there is no key, since wandb would prompt for one."""
    asked = os.environ.get("WANDB_MODE")
    if asked in ("offline", "disabled", "dryrun"):
        return "offline" if asked == "dryrun" else asked
    if logged_in():
        return "online"
    if asked:
        say_offline(f"WANDB_MODE={asked}, but there is no key (wandb login)")
    return "offline"


def logged_in() -> bool:
    """Whether a key for Weights & Biases is at hand, in the environment or in ~/.netrc."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(server or wandb.setup().settings.base_url).netloc] + ([] if server else ["api.wandb.ai"])
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(name) is not None for name in hosts)


def say_offline(why: str) -> None:
    """One line on stderr."""
    print(f"wandb: logging offline: {why}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested mapping under dotted names."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and key not in ("targets", "per_class", "averages", "kernels"):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found
