"""A task whose head is chosen by its name: one of `niwaki/task/heads/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from niwaki.errors import ConfigError
from niwaki.task.heads.head import Head, head_of
from niwaki.task.task import Batch, Rows, Task, reached

if TYPE_CHECKING:
    from datasets import Dataset

    from niwaki.data.corpus import Corpus
    from niwaki.model.anatomy import Anatomy
    from niwaki.recipe import Recipe

SETTINGS = (
    "descriptions", "template", "temperature", "pairs", "pattern", "verbalizer", "against_contradiction",
    "demonstrations", "calibrate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Headed(Task):
    """What becomes of a text, and of the model, is the head's business; what is null here is as the head has it."""

    head: str = "linear"
    descriptions: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    temperature: float | None = None
    pairs: int | None = None
    pattern: str | None = None
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    against_contradiction: bool | None = None
    demonstrations: int | None = None
    calibrate: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = self.chosen  # which refuses what it does not know
        if self.label_smoothing and chosen.refits:
            raise ConfigError(
                f"task.label_smoothing={self.label_smoothing}: {chosen.setting} has a loss without labels to "
                "smooth; leave it 0"
            )

    @cached_property
    def chosen(self) -> Head:
        """The head. Raises ConfigError for one that there is not, or a setting that it does not have."""
        return head_of(self.head, self.max_length, {name: getattr(self, name) for name in SETTINGS})

    @property
    def head_learns(self) -> bool:  # type: ignore[override]
        return self.chosen.is_new

    def alike(self, other: Task) -> bool:
        return super().alike(other) and isinstance(other, Headed) and self.head == other.head

    def reads_as(self, other: Task) -> bool:
        return super().reads_as(other) and isinstance(other, Headed) and self.chosen.reading == other.chosen.reading

    def auto_class_of(self, config: Any) -> str:
        return self.chosen.auto_class_of(config)

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        return self.chosen.outputs(labels)

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        self.chosen.attach(model, labels)

    def check_config(self, config: Any) -> None:
        self.chosen.check_config(config)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        self.chosen.check(anatomy)

    def conflict(self, recipe: Recipe) -> str | None:
        from niwaki import artifact

        untaught = recipe.data.shots == 0 and not recipe.data.unlabelled
        if untaught and not self.chosen.guesses and not artifact.is_artifact(recipe.model.place):
            return (
                f"data.shots=0: {self.chosen.setting} needs training rows; choose a head that does without, "
                "task.head=label_embedding"
            )
        return self.chosen.conflict(recipe)

    def modules(self) -> list[str]:
        own = (kind.__module__ for kind in type(self.chosen).__mro__ if issubclass(kind, Head))
        return reached([*super().modules(), *own])

    def begin(self, model: Any, corpus: Corpus) -> None:
        self.chosen.begin(model, corpus)

    @property
    def refits(self) -> bool:
        return self.chosen.refits

    def refit(self, model: Any, corpus: Corpus) -> None:
        self.chosen.refit(model, corpus)

    def epoch(self, features: Dataset) -> Dataset:
        return self.chosen.epoch(features)

    def company(
        self, features: Sequence[dict[str, Any]], split: Dataset, drawing: tuple[int, int]
    ) -> list[dict[str, Any]]:
        return self.chosen.company(features, split, drawing)

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        return self.chosen.collate(features, tokenizer)

    def loss(self, outputs: Any, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        own = self.chosen.loss(outputs, batch)
        return super().loss(outputs, batch, smoothing=smoothing) if own is None else own

    def features_of(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, labels: Sequence[str]) -> Rows:
        """What of raw rows the model reads, by columns."""
        return self.chosen.encode({key: [row[key] for row in rows] for key in rows[0]}, tokenizer, labels)
