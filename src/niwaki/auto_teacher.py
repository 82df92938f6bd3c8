"""A teacher that is tuned first: `compression.<method>.teacher=auto`. Each seed has its own, since the seed is part of
the teacher's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from niwaki.artifact import stamp
from niwaki.errors import ConfigError, UserError
from niwaki.measure.gather import read_config
from niwaki.model.load import located
from niwaki.study import PLACES, digest, settings_of

AUTO = "auto"
TEACHERS = Path("logs", "teachers")
ASIDE = PLACES | {"measure", "logger", "store", "callbacks"}  # what makes no other teacher
SHOWN = ("learning_rate", "progress")  # callbacks that change nothing of what is learned
BEST = {"_target_": "niwaki.callbacks.Checkpoint", "best": True, "every_steps": None}

Run = Callable[[Mapping[str, Any], Path, bool], None]
"""(config, folder, whether it goes on with what stands there): a whole run."""


def wanted(config: Mapping[str, Any]) -> list[str]:
    """The methods of `compression` that ask for such a teacher."""
    methods: Mapping[str, Mapping[str, Any]] = config.get("compression") or {}
    return [name for name, settings in methods.items() if settings.get("teacher") == AUTO]


def of_teacher(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the teacher's own run: the same task, labelled rows, tuning and seed, on the whole model, nothing
    compressed or exported, and the best step on validation whatever the student keeps. The seed is the student's, since
    it also decides which rows a split is carved of."""
    shown = {name: settings for name, settings in (config.get("callbacks") or {}).items() if name in SHOWN}
    model, data = {**config["model"], "layers": None}, {**config["data"], "unlabelled": None}
    return {
        **{name: node for name, node in config.items() if name != "export"},
        "model": model,
        "data": data,
        "compression": {},
        "callbacks": {"checkpoint": BEST, **shown},
        "task_weight": 1.0,
        "name": "teachers",
        "study": None,
    }


def key_of(teacher: Mapping[str, Any]) -> str:
    """Eight hex digits: of its config but what makes no other teacher, and of what its files hold."""
    return digest({**teacher, "files": contents(teacher)}, ASIDE)


def contents(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of each local file that a run reads, by its path: rows, and those of a model's folder."""
    data, name = config["data"], config["model"].get("name")
    named = [data.get(field) for field in ("train", "validation", "test", "path")]
    places = [place for one in named for place in (one if isinstance(one, list | tuple) else [one]) if place]
    places += [located(name, "model.name")] if name else []
    return {str(file): stamp(file) for place in places for file in files_in(Path(place))}


def files_in(place: Path) -> list[Path]:
    """A file, or all in a folder that are not hidden; none where there is neither."""
    if place.is_file():
        return [place]
    found = [path for path in place.rglob("*") if path.is_file()]
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(place).parts))


def refuse_another(folder: Path, teacher: Mapping[str, Any]) -> None:
    """Raise ConfigError where a folder holds a run of another config than the teacher's."""
    try:
        same = settings_of(read_config(folder), ASIDE) == settings_of(teacher, ASIDE)
    except UserError:
        same = False
    if not same:
        raise ConfigError(f"teacher=auto: {folder} holds a run of another config than the teacher's; remove it")


def with_teacher(config: Mapping[str, Any], run: Run) -> Mapping[str, Any]:
    """The config with a tuned teacher where one is asked for: of an earlier run of the same config, gone on with where
    that was stopped, or made now. Two processes that want the same one make it once.

    Raises:
        ConfigError: its folder holds a run of another config.
    """
    from filelock import FileLock

    asking = wanted(config)
    if not asking:
        return config
    teacher = of_teacher(config)
    folder = TEACHERS / key_of(teacher)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        begun = (folder / "config.yaml").is_file()
        if begun:
            refuse_another(folder, teacher)
        if not (folder / "metrics.json").is_file():
            run(teacher, folder, begun)
    methods = config["compression"]
    found = {name: {**methods[name], "teacher": str(folder / "model")} for name in asking}
    return {**config, "compression": {**methods, **found}}
