"""Table to text: a table is written once and held to all its references; a column may say how."""

from __future__ import annotations

from typing import Any

import pytest
import sacrebleu
from written import batch_of, features, tiny

from niwaki.errors import ConfigError, DataError
from niwaki.task.code_generation import CodeGeneration
from niwaki.task.dialogue import Dialogue
from niwaki.task.table_to_text import TableToText

ROWS = {
    "source": ["name[x]", "name[y]", "name[x]", "name[y]", "name[z]"],
    "target": ["x is here", "y is here", "there is x", "y is here", "z"],
}


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_table_is_written_once_and_compared_to_all(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TableToText(max_length=32, max_target_length=16)
    model, tokenizer = tiny(family, task)
    whole = batch_of(task, tokenizer, ROWS)
    scores: Any = task.scores((), tokenizer)
    asked: list[int] = []
    own = TableToText.answered
    monkeypatch.setattr(
        TableToText,
        "answered",
        lambda self, model, batch: asked.append(len(batch["reference"])) or own(self, model, batch),
    )
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        task.score(scores, model, {name: tensor[part] for name, tensor in whole.items()})
    assert asked == [2, 1]  # x and y; none; z
    assert scores.references == [["x is here", "there is x"], ["y is here"], ["z"]]
    scores.written = ["there is x", "y is", "z"]
    found = scores.compute()
    assert found["tables"] == 3
    streams = [["x is here", "y is here", "z"], ["there is x", None, None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(scores.written, streams).score)
    assert found["rougeL"] == pytest.approx(100 * (1 + 0.8 + 1) / 3)


def test_an_attribute_steers() -> None:
    task = TableToText(prefix="{attribute}: ", max_length=48)
    _, tokenizer = tiny("llama", task)
    rows = {"source": ["a[b]", "a[b]"], "target": ["t", "t"], "attribute": ["long", "brief"]}
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in features(task, tokenizer, rows)]
    assert [text.replace(" ", "") for text in texts] == ["long:a[b]", "brief:a[b]"]
    with pytest.raises(DataError, match="the rows have no column 'attribute'"):
        features(task, tokenizer, {"source": ["a"], "target": ["b"]})
    with pytest.raises(ConfigError, match=r"'style' is no column that may be named there"):
        TableToText(prefix="{style}: ")
    with pytest.raises(ConfigError, match=r"write {{ for a brace"):
        TableToText(prefix="{")


def test_attributes_make_tables_of_their_own() -> None:
    task = TableToText(prefix="{attribute}: ", max_length=48, max_target_length=8)
    model, tokenizer = tiny("bart", task)
    rows = {"source": ["a[b]"] * 2, "target": ["t", "u"], "attribute": ["long", "brief"]}
    scores: Any = task.scores((), tokenizer)
    task.score(scores, model, batch_of(task, tokenizer, rows))
    assert scores.references == [["t"], ["u"]]


@pytest.mark.parametrize("prefix", ["{attribute:d}: ", "{attribute!r}: "])
def test_a_prefix_has_a_name_alone_between_braces(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"needs a name alone between braces, such as {attribute}$"):
        TableToText(prefix=prefix)


def test_doubled_braces_are_braces() -> None:
    for task, rows in (
        (TableToText, {"source": ["c"], "target": ["t"]}),
        (Dialogue, {"history": [["c"]], "response": ["t"]}),
    ):
        one = task(prefix="{{a}}: ", max_length=48)
        _, tokenizer = tiny("llama", one)
        text = tokenizer.decode(features(one, tokenizer, rows)[0]["input_ids"], skip_special_tokens=True)
        assert text.replace(" ", "") == "{a}:c"


def test_a_column_that_is_only_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^task.prefix='{id} ': 'id' is no column that may be named there"):
        CodeGeneration(prefix="{id} ")


def test_a_row_without_the_column_of_the_prefix_is_refused_alone() -> None:
    task = TableToText(prefix="{attribute}: ", max_length=48, max_target_length=8)
    model, tokenizer = tiny("bart", task)
    rows = [{"source": "a[b]", "attribute": "long"}, {"source": "c[d]"}]
    found = task.answers(model, tokenizer, (), rows)
    assert next(found)["source"] == "a[b]"
    with pytest.raises(DataError, match=r"^task.prefix='{attribute}: ': the rows have no column 'attribute'$"):
        next(found)
    with pytest.raises(DataError, match=r"the row with source 'c\[d\]' has no 'attribute'$"):
        task._sources({"source": ["a[b]", "c[d]"], "attribute": ["long", None]})
