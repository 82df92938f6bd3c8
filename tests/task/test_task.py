"""What every task asks of a model before its weights are loaded."""

from __future__ import annotations

from typing import Any

import pytest

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.causal_lm import CausalLM
from niwaki.task.classification import Classification
from niwaki.task.instruction import Instruction
from niwaki.task.ner import NER
from niwaki.task.regression import Regression
from niwaki.task.span_corruption import SpanCorruption
from niwaki.task.table_to_text import TableToText
from niwaki.task.task import alike


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


def test_the_modules_of_a_task_are_those_that_its_code_reaches() -> None:
    """A change in any of them makes other features."""

    def names(task: Any) -> set[str]:
        return {name.removeprefix("niwaki.task.") for name in task.modules()}

    assert {"instruction", "text_to_text", "task", "chat", "layout", "search"} <= names(Instruction())
    assert {"table_to_text", "constraint", "kept", "layout"} <= names(TableToText())
    assert {"span_corruption", "masked_lm", "causal_lm", "layout"} <= names(SpanCorruption())
    assert "texts" in names(Regression())
    assert "chat" not in names(TableToText())
    assert {"heads.head", "heads.prompt", "patterns", "descriptions"} <= names(Classification(head="prompt"))


def test_rows_with_other_columns_stand_apart_and_in_order() -> None:
    rows = [{"a": 1}, {"a": 2}, {"a": 3, "b": 4}, {"b": 6, "a": 5}, {"a": 7}]
    assert list(alike(rows, 1)) == [[row] for row in rows]
    assert list(alike(rows)) == [rows[:2], rows[2:4], rows[4:]]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_row_without_an_optional_column_is_answered_beside_one_with_it(family: str) -> None:
    rows = [{"text": "one"}, {"text": "one", "text_pair": "two"}, {"text": "three"}]
    task = Regression()
    spec = Tiny(name=family, dropout=0.0)
    model, tokenizer = spec.load(task, (), seed=0), spec.tokenizer()
    model.requires_grad_(False)
    together = list(task.answers(model, tokenizer, (), rows))
    alone = [next(task.answers(model, tokenizer, (), [row])) for row in rows]
    assert [row["text"] for row in together] == ["one", "one", "three"]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
