"""Constraints hold for any model, search and draw: a random one would break each of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from written import batch_of, features, tiny, without_padding

from niwaki.errors import ConfigError, DataError
from niwaki.task.constraint import holds, next_tokens, one_of, trie, with_all
from niwaki.task.layout import InLine
from niwaki.task.table_to_text import TableToText
from niwaki.task.text_to_text import texts_of

ROWS = {
    "source": ["name[Blue Spice], near[Cafe Rouge], area[x y]", "name[Aromi]", "area[riverside], name[ab]"],
    "target": ["a", "b", "c"],
}
ASKED = [{"source": source} for source in ROWS["source"]]
WAYS: list[dict[str, Any]] = [
    {}, {"num_beams": 3}, {"do_sample": True, "temperature": 3.0}, {"no_repeat_ngram_size": 1},
    {"num_beams": 4, "length_penalty": -2.0}, {"repetition_penalty": 3.0},
]  # fmt: skip


def models(task: TableToText, family: str) -> Any:
    """The same tiny model, less and less like itself."""
    for scale in (1.0, 3.0, 8.0):
        yield tiny(family, task, scale=scale)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_an_answer_is_one_of_the_choices(family: str, way: dict[str, Any]) -> None:
    choices = ["yes", "yes or no", "never", "n"]
    task = TableToText(max_length=64, max_target_length=16, choices=choices, **way)
    found = set()
    for model, tokenizer in models(task, family):
        texts = [row["generated"] for row in task.answers(model, tokenizer, (), ASKED)]
        assert set(texts) <= set(choices)
        found |= set(texts)
    assert found


def test_the_likeliest_choice_is_taken() -> None:
    """By beams as wide as the list: the choice with the largest sum of log p."""
    task = TableToText(
        max_length=64, max_target_length=16, choices=["one", "ten", "tea"], num_beams=6, length_penalty=0.0
    )
    model, tokenizer = tiny("llama", task, scale=3.0)
    batch = batch_of(task, tokenizer, {**ROWS, "references": [["x"]] * 3})
    best = []
    for row in range(3):
        sums = []
        for text in task.choices or ():
            one = batch_of(task, tokenizer, {"source": [ROWS["source"][row]], "target": [text]})
            logits, labels = task.counted(model(**task.inputs(one)), one)
            sums.append(logits.log_softmax(-1).gather(1, labels[:, None]).sum().item())
        best.append((task.choices or ())[sums.index(max(sums))])
    assert texts_of(task.answered(model, batch), tokenizer) == best


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_values_occur(family: str, way: dict[str, Any]) -> None:
    task = TableToText(max_length=64, max_target_length=24, must_contain=["name", "near"], **way)
    for model, tokenizer in models(task, family):
        batch = task.collate(features(task, tokenizer, ROWS), tokenizer)
        written = without_padding(task.answered(model, batch))
        for tokens, values in zip(written, (["blue spice", "cafe rouge"], ["aromi"], ["ab"]), strict=True):
            assert len(tokens) <= 24
            for value in values:
                assert holds(tuple(tokens), tuple(tokenizer(value, add_special_tokens=False)["input_ids"])), value
        answers = task.answers(model, tokenizer, (), ASKED)
        for row, values in zip(answers, (["blue spice", "cafe rouge"], ["aromi"], ["ab"]), strict=True):
            assert all(value in row["generated"] for value in values)


def test_a_model_that_would_end_writes_what_lacks_first() -> None:
    """Token 9 ends a text; the model wants nothing else, then 5 rather than 7. Values: (7, 8) and (5,)."""
    values = torch.tensor([[[[7, 8], [7, 8]], [[5, -100], [5, -100]]]])
    change = with_all(values, frozenset([9]), 20)([0], 0)
    scores = torch.zeros(1, 10)
    scores[0, 9], scores[0, 5] = 5.0, 1.0
    written: list[int] = []
    for _ in range(4):
        written.append(int(change(torch.tensor([written], dtype=torch.long), scores).argmax()))
    assert written == [5, 7, 8, 9]


def test_a_model_that_would_never_end_has_room_left_for_what_lacks() -> None:
    values = torch.tensor([[[[7, 8], [7, 8]]]])
    change = with_all(values, frozenset([9]), 6)([0], 0)
    scores = torch.zeros(1, 10)
    scores[0, 1] = 5.0
    written: list[int] = []
    for _ in range(6):
        written.append(int(change(torch.tensor([written], dtype=torch.long), scores).argmax()))
    assert written == [1, 1, 1, 7, 8, 1]


def test_what_was_begun_is_finished() -> None:
    assert next_tokens((1, 2, 3), [(2, 3, 4), (3, 5), (7,)]) == {4}
    assert next_tokens((1, 2, 6), [(2, 3, 4), (3, 5), (7,)]) == {2, 3, 7}
    assert next_tokens((), [(2, 3)]) == {2}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.choices=\['a'\]: needs null where task.must_contain is set"):
        TableToText(choices=["a"], must_contain=["b"])
    with pytest.raises(ConfigError, match=r"task.choices=\[\]: needs null or a list of one text or more"):
        TableToText(choices=[])
    task = TableToText(max_target_length=8, must_contain=["name"])
    _, tokenizer = tiny("llama", task)
    with pytest.raises(DataError, match=r"Blue Spice are 9 tokens, and task.max_target_length=8"):
        features(task, tokenizer, ROWS)
    long = TableToText(max_target_length=4, choices=["abcdefgh"])
    with pytest.raises(ConfigError, match=r"'abcdefgh' is longer than task.max_target_length=4"):
        batch_of(long, tokenizer, ROWS)


def test_choices_are_one_tree_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trie(((1, 2, 9), (1, 3, 9), (1, 9))) == {1: {2: {9: {}}, 3: {9: {}}, 9: {}}}
    assert trie(((1, 2),)) is trie(((1, 2),))
    change = one_of(torch.tensor([[1, 2, 9], [1, 9, -100]]), frozenset([9]))([0], 0)
    allowed = [
        torch.isfinite(change(torch.tensor([text], dtype=torch.long), torch.zeros(1, 10))[0])
        .nonzero()
        .flatten()
        .tolist()
        for text in ([], [1], [1, 2])
    ]
    assert allowed == [[1], [2, 9], [9]]
    task = TableToText(choices=["a b", "c"])
    _, tokenizer = tiny("llama", task)
    rows = features(task, tokenizer, ROWS)
    first = task.collate(rows, tokenizer)["choices"]
    monkeypatch.setattr(InLine, "targets", lambda *_: pytest.fail("tokenized again"))
    assert torch.equal(task.collate(rows, tokenizer)["choices"], first)
