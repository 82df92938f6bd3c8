"""What combines with what, asked of the rules that refuse a run before it starts: no table is kept by hand.

python -m niwaki.combinations > docs/combinations.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from niwaki.quiet import quiet_libraries

quiet_libraries()

from niwaki import compose  # noqa: E402
from niwaki.catalogue import options  # noqa: E402
from niwaki.errors import ConfigError  # noqa: E402
from niwaki.model.tiny import FAMILIES  # noqa: E402
from niwaki.pipeline import check_on_empty_model  # noqa: E402
from niwaki.recipe import Recipe  # noqa: E402
from niwaki.stage import refuse_conflicts  # noqa: E402

LABELS = {  # by task; () for the others
    "classification": ("no", "yes"),
    "multi_label": ("no", "yes"),
    "ner": ("B-X", "I-X", "O"),
    "relation": ("A(e1,e2)", "A(e2,e1)", "Other"),
}
KINDS = ("causal_lm", "classification", "masked_lm", "ner", "translation")  # a task for each kind of model
YES = "yes"


# Lengths that each tiny family reads, where those of a task are for models of use.
SHORT = {"code_generation": ["task.max_length=320", "task.max_target_length=160"]}


def needed(name: str) -> list[str]:
    """What an option cannot do without."""
    kind, _, method = name.rpartition("/")
    return [f"compression.{method}.teacher=teacher"] if kind == "distill" else SHORT.get(name, [])


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One choice of each axis, on a tiny model of a family."""

    task: str = "classification"
    family: str = "bert"
    tuning: str = "full"
    compression: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The defaults with these choices.

        Raises:
            ConfigError: an option cannot be built.
        """
        methods = {name: option("compression", name) for name in self.compression}
        return replace(
            defaults(), task=option("task", self.task), model=option("model", f"tiny-{self.family}"),
            tuning=option("tuning", self.tuning), compression=methods,
        )  # fmt: skip

    def refusal(self) -> str | None:
        """Why this is refused, before any weight is loaded; None where it works."""
        try:
            recipe = self.recipe
            refuse_conflicts(recipe.stages)
            check_on_empty_model(recipe, LABELS.get(self.task, ()))
        except ConfigError as error:
            return str(error)
        return None


@cache
def defaults() -> Recipe:
    """The recipe without any override."""
    return compose.build(compose.compose([]).config)


@cache
def option(axis: str, name: str) -> Any:
    """One option of an axis, with its own defaults."""
    many = axis in compose.GROUPS_OF_MANY
    chosen = f"{axis}=[{name}]" if many else f"{axis}={name}"
    found = getattr(compose.build(compose.compose([chosen, *needed(name)]).config), axis)
    return next(iter(found.values())) if many else found


def names(axis: str) -> list[str]:
    """The options of an axis."""
    return [one.name for one in options(axis)]


@cache
def family_of(task: str) -> str:
    """The family of the model that a task takes unless told otherwise."""
    name = compose.compose([f"task={task}"]).config["model"]["name"]
    return name if name in FAMILIES else "bert"


class Page:
    """A markdown page of tables whose refusals point to a list of reasons."""

    def __init__(self) -> None:
        self.lines = [
            "# What combines with what",
            "",
            "Written by `make docs` from the rules that refuse a run before any weight is loaded, with each option's",
            "defaults and tiny models. A number is the reason for a refusal, below. Settings may change an answer: a",
            "run that cannot be is refused in the same words before it starts.",
        ]
        self._reasons: dict[str, int] = {}

    def table(self, title: str, rows: Sequence[str], columns: Sequence[str], cell: Callable[..., Combination]) -> None:
        """One table; `cell(row, column)` is what is asked."""
        self.lines += ["", f"## {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            found = [self._answer(cell(row, column)) for column in columns]
            self.lines.append(f"| {row} | " + " | ".join(found) + " |")

    def text(self) -> str:
        """The page, with its reasons."""
        reasons = [f"{number}. {reason}" for reason, number in self._reasons.items()]
        return "\n".join([*self.lines, "", "## Reasons", "", *reasons])

    def _answer(self, combination: Combination) -> str:
        reason = combination.refusal()
        if reason is None:
            return YES
        return str(self._reasons.setdefault(reason, len(self._reasons) + 1))


def page() -> str:
    """Every task, tuning and compression with every family, task and tuning, and every pair of compressions."""
    written, tunings, methods, tasks = Page(), names("tuning"), names("compression"), names("task")
    written.table("task x family", tasks, list(FAMILIES), lambda task, family: Combination(task=task, family=family))
    for task in KINDS:
        written.table(
            f"tuning x family, task={task}", tunings, list(FAMILIES),
            lambda tuning, family, task=task: Combination(task=task, family=family, tuning=tuning),
        )  # fmt: skip
    written.table(
        "tuning x task, on the family that a task takes unless told otherwise", tunings, tasks,
        lambda tuning, task: Combination(task=task, family=family_of(task), tuning=tuning),
    )  # fmt: skip
    written.table(
        "compression x task, on the family that a task takes unless told otherwise", methods, tasks,
        lambda method, task: Combination(task=task, family=family_of(task), compression=(method,)),
    )  # fmt: skip
    written.table(
        "tuning x compression", tunings, methods,
        lambda tuning, method: Combination(tuning=tuning, compression=(method,)),
    )  # fmt: skip
    written.table(
        "compression x compression", methods, methods,
        lambda one, other: Combination(compression=tuple(dict.fromkeys((one, other)))),
    )  # fmt: skip
    return written.text()


if __name__ == "__main__":
    print(page())
