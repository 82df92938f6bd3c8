"""What a run tells the person who started it: the plan, what learns, and the table in the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from niwaki.data.corpus import Corpus
    from niwaki.recipe import Recipe


def notice(text: str) -> None:
    """A line about something that takes its time; a progress bar stays below it."""
    print(text, file=sys.stderr, flush=True)


def exported(one: Mapping[str, Any]) -> str:
    """An export in a few words."""
    from niwaki.measure.report import number

    said = {"bytes": one["bytes"], **one["test"], "latency_ms": one["latency_ms"]}
    return ", ".join(f"{name} {number(name, value)}" for name, value in said.items() if value is not None)


class Console:
    """The terminal."""

    def __init__(self) -> None:
        self._console = rich.console.Console(highlight=False)

    def plan(self, recipe: Recipe, corpus: Corpus) -> None:
        """Each step of the run and what it will do."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        rows = ", ".join(f"{len(split):,} {name}" for name, split in corpus.features.items())
        without = f", {corpus.unlabelled:,} of the train rows without a label" if corpus.unlabelled else ""
        unit = recipe.task.unit
        classes = f", {len(corpus.labels)} labels" if corpus.labels else ""
        for step, what in recipe.plan():
            table.add_row(f"[bold]{step}[/bold]", what)
        table.add_row("[bold]data[/bold]", f"{rows} {unit}{without}{classes}")
        self._console.print(table)

    def learning(self, model: nn.Module) -> None:
        """How many parameters learn."""
        from niwaki.measure.size import values

        total = sum(tensor.numel() for tensor in values(model))
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._console.print(f"{learning:,} parameters learn, {100 * learning / total:.2f}% of {total:,}")

    def result(self, metrics: Mapping[str, Any], folder: Path) -> None:
        """The table of before and after, and where everything is."""
        from niwaki.measure.report import table

        self._console.print(table(metrics))
        for name, one in (metrics.get("exports") or {}).items():
            self._console.print(f"{folder}/exports/{name}/: {exported(one)}")
        self._console.print(f"{folder}/: metrics.json, report.md, report.png, model/")
