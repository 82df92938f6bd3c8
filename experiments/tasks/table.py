"""Print what each run of `study.sh all` scored, beside what takes no learning: the rows of README.md's first table.

.venv/bin/python experiments/tasks/table.py [LOGS]

The commonest label for classes and choices, the mean for numbers, chance for a ranking, nothing found for spans and
relations, and for texts what the same model writes before it is tuned.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from niwaki import compose


def trivial(task: str, metrics: dict[str, Any], train: Any, test: Any) -> float:
    """The score without learning, in the metric of the task."""
    if metrics["before"]:
        return float(metrics["before"]["test"][metrics["metric"]])
    if task in ("classification", "multiple_choice"):
        common = Counter(train["label"]).most_common(1)[0][0]
        return sum(label == common for label in test["label"]) / len(test)
    if task == "retrieval":
        several = len(set(test["candidate"]))
        return sum(1 / rank for rank in range(1, several + 1)) / several  # of one that follows
    return 0.0


def main(logs: Path) -> None:
    """Read the runs and print a line for each."""
    runs = [file for file in sorted(logs.glob("tasks-*/run/metrics.json")) if file.parts[-3].count("-") == 1]
    for file in runs:  # those of other parts have a dash more in their names
        metrics = json.loads(file.read_text())
        recipe = compose.build(yaml.safe_load(file.with_name("config.yaml").read_text()))
        rows = recipe.data.splits(recipe.task.needs, recipe.seed)
        name, least = metrics["metric"], trivial(metrics["task"], metrics, rows["train"], rows["test"])
        scores = {key: round(value, 4) for key, value in metrics["after"]["test"].items()}
        print(
            f"| {file.parts[-3].removeprefix('tasks-')} | {len(rows['train']):,} / {len(rows['test']):,} | {name} | "
            f"{scores[name]:.3f} | {least:.3f} | {metrics['train_seconds']:.0f} s | {scores}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "logs"))
