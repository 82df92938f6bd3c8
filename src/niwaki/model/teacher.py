"""Loading a teacher: a model that already does the student's task, on the same vocabulary and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.model.anatomy import adapt
from niwaki.model.embeddings import KeepTokens
from niwaki.model.load import Pretrained, auto_class, located

if TYPE_CHECKING:
    from niwaki.task.task import Task


@runtime_checkable
class Taught(Protocol):
    """A stage that learns from teachers."""

    def teachers(self) -> dict[str, str]:
        """The fields of the config that name a teacher, and the hub name, folder or artifact that each names."""
        ...


@dataclass(frozen=True)
class Uncut:
    """The vocabulary that a student had before tokens were left out, and the numbers in it of those that stay."""

    words: dict[str, int]
    tokens: Sequence[int]


def check_teacher(
    place: str, task: Task, labels: Sequence[str], vocabulary: dict[str, int], field: str, uncut: Uncut | None = None
) -> bool:
    """Look at what a teacher says of itself, and load none of its weights. `field` names it in errors. Returns whether
    it has the student's vocabulary; else it has `uncut`, of which the student has a part.

    Raises:
        ConfigError: another task, other labels, or another vocabulary.
    """
    place = located(place, field)
    spec = Pretrained(name=place)
    if artifact.is_artifact(place):
        card = artifact.parse_card(Path(place))
        theirs = artifact.task_of(card)
        if type(theirs) is not type(task):
            raise ConfigError(f"{field}={place!r}: does the task {theirs.name}, the student {task.name}")
        refuse_other_labels(place, card["labels"], labels, field)
    else:
        config = spec.config()
        needed = type(spec._try(lambda: spec.empty(task, ()))).__name__
        if needed not in (config.architectures or [needed]):
            raise ConfigError(
                f"{field}={place!r}: is a {config.architectures[0]}; the task {task.name} needs a {needed}"
            )
        refuse_other_labels(place, [config.id2label[i] for i in sorted(config.id2label)], labels, field)
    words = spec.tokenizer().get_vocab()
    if words != vocabulary and (uncut is None or words != uncut.words):
        raise ConfigError(
            f"{field}={place!r}: its vocabulary ({len(words)} entries) is not the student's ({len(vocabulary)}); "
            "logits can only be compared on the same one"
        )
    return bool(words == vocabulary)


def refuse_other_labels(place: str, theirs: Sequence[str], labels: Sequence[str], field: str) -> None:
    """Raise ConfigError where the student has labels and the teacher's are not the same, in the same order."""
    if labels and tuple(theirs) != tuple(labels):
        odd = sorted(set(theirs) ^ set(labels)) or [f"order {list(theirs)}, not {list(labels)}"]
        raise ConfigError(f"{field}={place!r}: its labels are not the student's ({', '.join(odd[:3])})")


def load_teacher(
    place: str, task: Task, labels: Sequence[str], vocabulary: dict[str, int], field: str, uncut: Uncut | None = None
) -> Any:
    """The teacher's model. `field` of the config names it in errors. A teacher of the vocabulary that the student had
    before tokens were left out loses the same ones: it reads the student's tokens, and its logits are of these.

    Raises:
        ConfigError: another task, other labels, another vocabulary, or no trained head.
    """
    same = check_teacher(place, task, labels, vocabulary, field, uncut)
    teacher = loaded(located(place, field), task, field)
    if not same:
        assert uncut is not None
        KeepTokens.of(uncut.tokens).apply(teacher)
    return teacher


def loaded(place: str, task: Task, field: str) -> Any:
    """The model at a place, with its trained head."""
    if artifact.is_artifact(place):
        return artifact.load(place).model
    spec = Pretrained(name=place)
    teacher, report = spec._try(
        lambda: auto_class(task, spec.config()).from_pretrained(
            spec.place, dtype=torch.float32, output_loading_info=True
        )
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise ConfigError(f"{field}={place!r}: has no trained head for the task {task.name} ({missing} is missing)")
    adapt(teacher)
    return spec.padded(teacher)
