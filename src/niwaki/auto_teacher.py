"""A teacher that is tuned first: `compression.<method>.teacher=auto`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from niwaki.study import digest

AUTO = "auto"
TEACHERS = Path("logs", "teachers")

Run = Callable[[Mapping[str, Any], Path, bool], None]
"""(config, folder, whether it goes on with what stands there): a whole run."""


def wanted(config: Mapping[str, Any]) -> list[str]:
    """The methods of `compression` that ask for such a teacher."""
    methods: Mapping[str, Mapping[str, Any]] = config.get("compression") or {}
    return [name for name, settings in methods.items() if settings.get("teacher") == AUTO]


def of_teacher(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the teacher's own run: the same task, labelled rows, tuning and seed, on the whole model, nothing
    compressed or exported. The seed is the student's, since it also decides which rows a split is carved of."""
    model, data = {**config["model"], "layers": None}, {**config["data"], "unlabelled": None}
    return {
        **{name: node for name, node in config.items() if name != "export"},
        "model": model,
        "data": data,
        "compression": {},
        "task_weight": 1.0,
        "name": "teachers",
        "study": None,
    }


def with_teacher(config: Mapping[str, Any], run: Run) -> Mapping[str, Any]:
    """The config with a tuned teacher where one is asked for: of an earlier run of the same config, gone on with where
    that was stopped, or made now. Two processes that want the same one make it once."""
    from filelock import FileLock

    asking = wanted(config)
    if not asking:
        return config
    teacher = of_teacher(config)
    folder = TEACHERS / digest(teacher)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "metrics.json").is_file():
            run(teacher, folder, (folder / "config.yaml").is_file())
    methods = config["compression"]
    found = {name: {**methods[name], "teacher": str(folder / "model")} for name in asking}
    return {**config, "compression": {**methods, **found}}
