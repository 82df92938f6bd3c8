"""What turns a text into one logit for each label: a head, which a task takes by its name, the name of its file."""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from niwaki.errors import ConfigError, nearest
from niwaki.task.task import Batch, Rows, pad
from niwaki.task.texts import tokenized

if TYPE_CHECKING:
    from datasets import Dataset

    from niwaki.data.corpus import Corpus
    from niwaki.model.anatomy import Anatomy
    from niwaki.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Head(abc.ABC):
    """One way to make logits (rows, labels) of texts. Its fields are the settings of the task that it takes, by their
    names there; a setting that the task leaves null is as it is here."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    is_new: ClassVar[bool] = True  # it has parameters that no model brings, so every tuning trains them
    guesses: ClassVar[bool] = True  # without a fit: says something of a label that it never saw a row of
    # Whether its logits can be of labels each by itself, of which a text may have any number.
    says_several: ClassVar[bool] = True
    refits: ClassVar[bool] = False  # it is computed anew from the training rows, before a validation and after the fit
    paper: ClassVar[str]

    max_length: int = 128
    several: bool = False  # whether a text may have any number of labels, each with a logit of yes against no

    @property
    def name(self) -> str:
        """`label_embedding`: where its file stands."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def setting(self) -> str:
        """What chooses it, for errors."""
        return f"task.head={self.name}"

    @property
    def reading(self) -> tuple[Any, ...]:
        """What a text becomes before a model reads it, lengths aside; heads that have the same one can read the same
        batch."""
        return ("text",)

    def auto_class_of(self, config: Any) -> str:
        """The transformers class for a model of this Hugging Face config."""
        return self.auto_class

    def outputs(self, labels: Sequence[str]) -> Sequence[str]:
        """The outputs that the config of the model names; none: those that it has."""
        return labels

    def attach(self, model: Any, labels: Sequence[str]) -> None:
        """Put it on a model that was just made, which may be empty (meta device)."""
        return None

    def check_config(self, config: Any) -> None:
        """Raise ConfigError for a Hugging Face config whose models cannot have it."""
        return None

    def check(self, anatomy: Anatomy) -> None:
        """Raise ConfigError for a model that cannot have it; it may be empty (meta device)."""
        return None

    def check_labels(self, labels: Sequence[str]) -> None:
        """Raise ConfigError where its settings do not fit the labels."""
        return None

    def conflict(self, recipe: Recipe) -> str | None:
        """The reason why it cannot be part of such a run, or None."""
        return None

    def begin(self, model: Any, corpus: Corpus) -> None:
        """Write what is computed of a model that was just loaded, in its tokens."""
        return None

    def refit(self, model: Any, corpus: Corpus) -> None:
        """Compute it anew from the training rows."""
        return None

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        """Features of texts, or of pairs of texts."""
        return tokenized(rows, tokenizer, self.max_length)

    def collate(self, features: list[dict[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Rows of features to one padded batch, without labels."""
        return pad(features, tokenizer)

    def epoch(self, features: Dataset) -> Dataset:
        """The rows of one epoch of the fit."""
        return features

    def company(
        self, features: Sequence[dict[str, Any]], split: Dataset, drawing: tuple[int, int]
    ) -> list[dict[str, Any]]:
        """Rows of the training split that a training batch holds beside its own, drawn by (seed, epoch)."""
        return []

    def loss(self, outputs: Any, batch: Batch) -> Tensor | None:
        """What is learned in place of the task's own loss; None: nothing else."""
        return None


def names() -> list[str]:
    """The heads that there are."""
    folder = importlib.import_module("niwaki.task.heads")
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if module.name != "head")


def head_of(name: str, max_length: int, settings: Mapping[str, Any], *, several: bool = False) -> Head:
    """The head of this name, with those of the `settings` of a task that were given (no null, no empty mapping).

    Raises:
        ConfigError: there is no such head, or it has no such setting, or none of several labels a text.
    """
    if name not in names():
        near = nearest(name, names(), cutoff=0.5)
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"task.head={name!r}: needs one of {', '.join(names())}{hint}")
    kind = kind_of(name)
    if several and not kind.says_several:
        able = " or ".join(other for other in names() if kind_of(other).says_several)
        raise ConfigError(
            f"task.head={name}: says which one of the labels is the likeliest, and here a text may have several; "
            f"choose task.head={able}"
        )
    given = {key: value for key, value in settings.items() if value is not None and value != {}}
    for key, value in given.items():
        if key not in settings_of(kind):
            having = [other for other in names() if key in settings_of(kind_of(other))]
            raise ConfigError(
                f"task.{key}={value!r}: head={name} has no such setting; leave it null, or choose task.head="
                f"{' or '.join(having)}"
            )
    made: Head = kind(max_length=max_length, several=several, **given)
    return made


def kind_of(name: str) -> Any:
    """The class of a head."""
    return importlib.import_module(f"niwaki.task.heads.{name}").HEAD


def settings_of(kind: Any) -> list[str]:
    """The settings of a task that a head takes, beside the length of a text and whether it has several labels."""
    return [field.name for field in fields(kind) if field.name not in ("max_length", "several")]
