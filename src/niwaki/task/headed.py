"""A task whose head is chosen by its name: one of `niwaki/task/heads/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from niwaki.errors import ConfigError
from niwaki.task.heads.head import Head, head_of
from niwaki.task.task import Batch, Task, reached
from niwaki.task.texts import columns_of, rows_of

if TYPE_CHECKING:
    from datasets import Dataset

    from niwaki.data.corpus import Corpus
    from niwaki.model.anatomy import Anatomy
    from niwaki.recipe import Recipe

SETTINGS = (  # of heads, in a task that can have those
    "descriptions", "template", "temperature", "pairs", "pattern", "verbalizer", "against_contradiction",
    "demonstrations", "calibrate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Headed(Task):
    """What becomes of a text, and of the model, is the head's business; what is null here is as the head has it."""

    several: ClassVar[bool] = False  # whether a text may have any number of labels

    head: str = "linear"
    descriptions: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    temperature: float | None = None
    pairs: int | None = None

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
        settings = {name: getattr(self, name) for name in SETTINGS if hasattr(self, name)}
        return head_of(self.head, self.max_length, settings, several=self.several)

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
        return self.chosen.conflict(recipe) or super().conflict(recipe)

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

    def said(self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """The logits (rows, labels) of raw rows with the same columns."""
        features = rows_of(self.chosen.encode(columns_of(rows), tokenizer, labels))
        batch = {name: value.to(model.device) for name, value in self.chosen.collate(features, tokenizer).items()}
        logits: Tensor = model(**self.inputs(batch)).logits.float()
        return logits
