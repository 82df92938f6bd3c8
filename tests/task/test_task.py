"""What every task asks of a model before its weights are loaded."""

from __future__ import annotations

from typing import Any

import pytest

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.causal_lm import CausalLM
from niwaki.task.classification import Classification
from niwaki.task.ner import NER


def empty(task: Any, family: str, positions: int = 512) -> Anatomy:
    return Anatomy.of(Tiny(name=family, overrides={"max_position_embeddings": positions}).empty(task, ()))


def test_a_language_model_does_not_look_ahead() -> None:
    CausalLM().check(empty(CausalLM(), "llama"))
    with pytest.raises(ConfigError, match=r"^task=causal_lm: .* bert sees the whole text; try model=tiny-llama"):
        CausalLM().check(empty(CausalLM(), "bert"))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("task", [Classification, NER])
def test_other_tasks_take_either_kind(task: Any, family: str) -> None:
    task().check(empty(task(), family))


@pytest.mark.parametrize(("task", "family"), [(Classification, "bert"), (NER, "llama"), (CausalLM, "llama")])
def test_a_text_is_no_longer_than_the_model_reads(task: Any, family: str) -> None:
    anatomy = empty(task(), family, 100)
    task(max_length=100).check(anatomy)
    with pytest.raises(ConfigError, match=r"^task\.max_length=101: the model reads at most 100 tokens$"):
        task(max_length=101).check(anatomy)


def test_there_is_room_for_a_text_before_what_is_written() -> None:
    with pytest.raises(ConfigError, match=r"^task\.max_new_tokens=64: leaves no room .* at most 64 tokens$"):
        CausalLM(max_length=32).check(empty(CausalLM(), "llama", 64))
