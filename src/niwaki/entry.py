"""What niwaki/train.py does around Hydra: judge the command before anything starts, and turn mistakes into one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from niwaki import compose
from niwaki.errors import ConfigError, UserError
from niwaki.study import Point, quoted, run_study


def checked(arguments: list[str]) -> list[str]:
    """The arguments to hand to Hydra, after a look at everything that they ask for. A sweep with Hydra's own launcher
    is run here, as a study, and does not return."""
    debug = any(word.lower() == "debug=true" for word in arguments)
    return one_line(lambda: judged(arguments), debug=debug)


def judged(arguments: list[str]) -> list[str]:
    """`checked`, with UserErrors."""
    command = compose.parse(arguments)
    if command.asks:
        compose.check_query(command.overrides)
        return arguments
    resumed = [override for override in command.overrides if override.startswith("resume=")]
    if resumed:
        config, folder = read_resumed(command.overrides)
        compose.build(config)
        return ["resume=" + quoted(folder), "hydra.run.dir=" + quoted(folder)] + (
            ["debug=true"] if config["debug"] else []
        )
    points, varied = compose.points(command.overrides)
    composed = [compose.compose(point) for point in points]
    recipes = [compose.build(one.config) for one in composed]
    if not command.multirun:
        if varied:
            raise ConfigError(
                f"{varied[0]}: several values need -m (a multirun); a list is written as '{varied[0]}=[a,b]'"
            )
        if not composed[0].plain_launch:
            raise ConfigError(
                "hydra/launcher, hydra/sweeper: have no effect on a single run; add -m, or leave them out"
            )
        make_writable(composed[0].folder)
        return [*arguments, "hydra.run.dir=" + quoted(composed[0].folder)]
    if not composed[0].plain_launch:
        if not all(recipe.study for recipe in recipes):
            raise ConfigError("study=None: a launcher or sweeper of Hydra needs a folder for its runs; add study=NAME")
        return arguments
    folder = composed[0].sweep_folder if recipes[0].study else composed[0].folder
    swept = [tuple(o for o in point if o.partition("=")[0] in varied) for point in points]
    study = [
        Point(overrides=tuple(point), config=one.config, swept=what)
        for point, one, what in zip(points, composed, swept, strict=True)
    ]
    sys.exit(run_study(study, folder, [sys.executable, "-P", "-m", "niwaki.train"]))


def read_resumed(overrides: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """The config and the folder of a run that is to go on.

    Raises:
        ConfigError: the folder holds no run, a finished one, or other settings were given.
    """
    values = dict(override.split("=", 1) for override in overrides if "=" in override)
    folder = Path(values.pop("resume").strip("'\""))
    debug = values.pop("debug", "false").lower() == "true"
    values.pop("hydra.run.dir", None)
    if values:
        raise ConfigError(
            f"{next(iter(values))}: a resumed run keeps its settings; only debug can be given with resume"
        )
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"resume={str(folder)!r}: needs a run folder, with config.yaml in it")
    if (folder / "metrics.json").is_file():
        raise ConfigError(f"resume={str(folder)!r}: this run has finished; its numbers are in metrics.json")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return {**config, "debug": debug}, folder
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"resume={str(folder)!r}: its config.yaml is damaged") from error


def make_writable(folder: Path) -> None:
    """Create the run folder and try to write there, before anything else takes time.

    Raises:
        ConfigError: it cannot be written, or holds another run.
    """
    if (folder / "metrics.json").exists() or (folder / "checkpoints").exists():
        raise ConfigError(f"hydra.run.dir={str(folder)!r}: holds a run already; choose another folder, or resume=...")
    probe = folder / ".write-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"hydra.run.dir={str(folder)!r}: cannot be written ({error.strerror})") from error


def carry_out(config: Mapping[str, Any], folder: Path) -> None:
    """Run one config in its folder; the folder goes away again when nothing was written to it."""
    resume = config.get("resume") is not None
    if resume:
        config = {**read_resumed([f"resume={folder}"])[0], "debug": config["debug"]}
    one_line(lambda: run(config, folder, resume), debug=bool(config["debug"]), folder=folder)


def run(config: Mapping[str, Any], folder: Path, resume: bool) -> None:
    """Build the recipe once, run it; a teacher that is to be tuned first is, once the recipe has been judged."""
    from niwaki import auto_teacher, pipeline
    from niwaki.quiet import quiet_progress

    quiet_progress()
    if auto_teacher.wanted(config):
        recipe = compose.build(config)
        pipeline.check_teachers(recipe, *pipeline.judge(recipe), yet_to_come=auto_teacher.AUTO)
        config = auto_teacher.with_teacher(config, run)
    pipeline.run(compose.build(config), folder, config, resume=resume)


def one_line(action: Callable[[], Any], *, debug: bool, folder: Path | None = None) -> Any:
    """Do `action`; a user's mistake becomes one line on stderr and an exit code that is not 0."""
    try:
        return action()
    except UserError as error:
        if folder is not None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if debug:
            raise
        leave(f"error: {error}", getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        hint = f"; go on with: python train.py resume={folder}" if folder and (folder / "checkpoints").exists() else ""
        leave(f"interrupted{hint}", 130)


def leave(line: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    print(line, file=sys.stderr)
    sys.exit(code)
