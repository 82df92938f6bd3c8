"""Teachers: only one that does the same task, on the same labels and the same vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.model.teacher import check_teacher, load_teacher

FIELD = "compression.some_method.teacher"


@pytest.fixture
def place(tmp_path: Path) -> Callable[..., str]:
    """Save a setting as an artifact (or as a Hugging Face folder)."""

    def save(one: Any, *, plain: bool = False) -> str:
        folder = tmp_path / "teacher"
        if plain:
            one.model.save_pretrained(folder)
            one.tokenizer.save_pretrained(folder)
        else:
            artifact.save(
                folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
                base_config=one.model.config.to_dict(), edits=[],
            )  # fmt: skip
        return str(folder)

    return save


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm")])
def test_a_teacher_says_what_the_saved_model_says(
    setting: Callable[..., Any], place: Callable[..., str], family: str, task: str, plain: bool
) -> None:
    one = setting(family, task, seed=3)
    teacher = load_teacher(place(one, plain=plain), one.task, one.labels, one.tokenizer.get_vocab(), FIELD)
    assert torch.equal(one.logits(teacher), one.logits())


def refused(place: str, one: Any, vocabulary: dict[str, int] | None = None, look: Any = check_teacher) -> str:
    """What is said of a teacher before any of its weights are read."""
    with pytest.MonkeyPatch.context() as patch:
        if look is check_teacher:
            patch.setattr(artifact, "load", lambda *_: pytest.fail("weights were read"))
            patch.setattr(type(one.model), "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
        with pytest.raises(ConfigError) as caught:
            look(place, one.task, one.labels, vocabulary or one.tokenizer.get_vocab(), FIELD)
    assert str(caught.value).startswith(f"{FIELD}={place!r}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_task(setting: Callable[..., Any], place: Callable[..., str]) -> None:
    message = refused(place(setting("bert", "ner")), setting("bert", "classification"))
    assert "does the task ner, the student classification" in message


def test_other_labels(setting: Callable[..., Any], place: Callable[..., str]) -> None:
    one = setting()
    where = place(one)
    one.labels = ("maybe", "never", "yes")
    assert "its labels are not the student's (never, no)" in refused(where, one)


@pytest.mark.parametrize("plain", [False, True])
def test_the_same_labels_in_another_order(setting: Callable[..., Any], place: Callable[..., str], plain: bool) -> None:
    one = setting()
    where = place(one, plain=plain)
    one.labels = ("yes", "no", "maybe")
    assert "order" in refused(where, one)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_a_vocabulary_of_the_same_size_and_other_content(
    setting: Callable[..., Any], place: Callable[..., str], family: str, task: str, plain: bool
) -> None:
    one = setting(family, task)
    vocabulary = one.tokenizer.get_vocab()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    assert "its vocabulary" in refused(place(one, plain=plain), one, vocabulary)


def test_no_trained_head(setting: Callable[..., Any], place: Callable[..., str], tmp_path: Path) -> None:
    one = setting()
    one.model.base_model.save_pretrained(tmp_path / "bare")
    one.tokenizer.save_pretrained(tmp_path / "bare")
    assert "is a BertModel; the task classification needs a BertForSequenceClassification" in refused(
        str(tmp_path / "bare"), one
    )


def test_a_head_that_is_named_and_missing(setting: Callable[..., Any], place: Callable[..., str]) -> None:
    one = setting()
    where = place(one, plain=True)
    state = {name: tensor.contiguous() for name, tensor in one.model.state_dict().items() if "classifier" not in name}
    save_file(state, f"{where}/model.safetensors", metadata={"format": "pt"})
    assert "has no trained head for the task classification (classifier." in refused(where, one, look=load_teacher)


def test_a_place_that_is_not_there(setting: Callable[..., Any]) -> None:
    one = setting()
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_teacher("./nowhere", one.task, one.labels, one.tokenizer.get_vocab(), FIELD)
