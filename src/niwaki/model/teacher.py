"""Loading a teacher: a model that already does the student's task, on the same vocabulary and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.model.load import Pretrained, auto_class, located

if TYPE_CHECKING:
    from niwaki.task.task import Task

FIELD = "compression.logits.teacher"


def load_teacher(place: str, task: Task, labels: Sequence[str], vocabulary: dict[str, int]) -> Any:
    """The teacher's model.

    Raises:
        ConfigError: another task, other labels, another vocabulary, or no trained head.
    """
    place = located(place, FIELD)
    if artifact.is_artifact(place):
        saved = artifact.load(place)
        if type(saved.task) is not type(task):
            raise ConfigError(f"{FIELD}={place!r}: does the task {saved.task.name}, the student {task.name}")
        teacher, theirs, words = saved.model, saved.labels, saved.tokenizer.get_vocab()
    else:
        teacher, theirs, words = load_from_hub(place, task)
    if labels and tuple(theirs) != tuple(labels):
        odd = sorted(set(theirs) ^ set(labels)) or [f"order {list(theirs)}, not {list(labels)}"]
        raise ConfigError(f"{FIELD}={place!r}: its labels are not the student's ({', '.join(odd[:3])})")
    if words != vocabulary:
        raise ConfigError(
            f"{FIELD}={place!r}: its vocabulary ({len(words)} entries) is not the student's ({len(vocabulary)}); "
            "logits can only be compared on the same one"
        )
    return teacher


def load_from_hub(place: str, task: Task) -> tuple[Any, tuple[str, ...], dict[str, int]]:
    """A Hugging Face model with a trained head: (model, labels, vocabulary)."""
    spec = Pretrained(name=place)
    words = spec.tokenizer().get_vocab()
    teacher, report = spec._try(
        lambda: auto_class(task).from_pretrained(spec.place, dtype=torch.float32, output_loading_info=True)
    )
    made_for = teacher.config.architectures or [type(teacher).__name__]
    if type(teacher).__name__ not in made_for:
        raise ConfigError(
            f"{FIELD}={place!r}: is a {made_for[0]}; the task {task.name} needs a {type(teacher).__name__}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        raise ConfigError(f"{FIELD}={place!r}: has no trained head for the task {task.name} ({missing} is missing)")
    id2label = teacher.config.id2label or {}
    return teacher, tuple(id2label[i] for i in sorted(id2label)), words
