"""What a value of each column must be, and the labels of a column."""

import re
from typing import Any

import pytest
from datasets import Dataset

from niwaki.data import columns
from niwaki.data.columns import CHECKS, KEPT_BACK, labels_of
from niwaki.errors import DataError

SAID = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
TURNS = [*SAID, {"role": "assistant", "content": "hello"}]
TABLE = """
text text_pair label labels tokens tags context question answers id choices source target references history response
messages prompt solution tests entry_point candidate
"""


def test_every_column_of_every_task_has_a_check() -> None:
    assert set(CHECKS) == set(TABLE.split())
    assert set(KEPT_BACK) < set(CHECKS)


@pytest.mark.parametrize(
    ("check", "value", "canonical"),
    [
        (CHECKS["labels"], [], []),
        (CHECKS["labels"], ["b", 3, "a"], ["b", "3", "a"]),
        (columns.check_number, "-2.5", -2.5),
        (columns.check_number, 3, 3.0),
        (columns.check_index, 2, 2),
        (columns.check_index, "2", 2),
        (columns.check_index, 2.0, 2),
        (columns.check_index, "C", 2),
        (columns.check_zero_or_one, True, 1),
        (columns.check_zero_or_one, "0", 0),
        (columns.check_marked, "a <e2>b</e2> c <e1>d</e1>", "a <e2>b</e2> c <e1>d</e1>"),
        (CHECKS["choices"], ["a", "b"], ["a", "b"]),
        (CHECKS["history"], ["a"], ["a"]),
        (CHECKS["references"], ["a"], ["a"]),
        (CHECKS["id"], 7, "7"),
        (CHECKS["messages"], [{**turn, "name": "x"} for turn in TURNS], TURNS),
        (columns.check_open_messages, TURNS, SAID),
        (columns.check_open_messages, SAID, SAID),
        (CHECKS["answers"], {"text": [], "answer_start": []}, {"text": [], "answer_start": []}),
        (
            CHECKS["answers"],
            {"text": ["a"], "answer_start": [3.0], "answer_end": [4]},
            {"text": ["a"], "answer_start": [3]},
        ),
        (CHECKS["entry_point"], " add ", "add"),
    ],
)
def test_a_good_value_becomes_canonical(check: Any, value: Any, canonical: Any) -> None:
    found = check(value)
    assert found == canonical
    assert type(found) is type(canonical)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (CHECKS["labels"], None, "is empty"),
        (CHECKS["labels"], "a", "is text 'a', must be a list of labels; split(COLUMN, ;) is one of what ; parts"),
        (CHECKS["labels"], ["a", ""], "label 2 is empty"),
        (CHECKS["labels"], ["a", "b", "a"], "has 'a' twice, must name each label once"),
        (columns.check_number, None, "is empty"),
        (columns.check_number, " ", "is empty"),
        (columns.check_number, "high", "is str 'high', must be a finite number"),
        (columns.check_number, float("nan"), "is float nan, must be a finite number"),
        (columns.check_number, "inf", "is str 'inf', must be a finite number"),
        (columns.check_number, True, "is bool True, must be a finite number"),
        (columns.check_number, [1], "is list [1], must be a finite number"),
        (columns.check_index, None, "is empty"),
        (columns.check_index, -1, "is int -1, must be the number of a choice, counted from 0, or its letter"),
        (columns.check_index, 1.5, "is float 1.5, must be the number of a choice, counted from 0, or its letter"),
        (columns.check_index, "yes", "is str 'yes', must be the number of a choice, counted from 0, or its letter"),
        (columns.check_zero_or_one, 2, "is 2, must be 0 or 1"),
        (columns.check_zero_or_one, "like", "is str 'like', must be 0 or 1"),
        (columns.check_zero_or_one, "", "is empty"),
        (columns.check_marked, "a <e1>b</e1> c", "has <e2> nowhere, must have one <e2>...</e2>"),
        (columns.check_marked, "<e1>a</e1> <e2>b", "has </e2> nowhere, must have one <e2>...</e2>"),
        (columns.check_marked, "<e1>a</e1> <e1>b</e1>", "has <e1> 2 times, must have one <e1>...</e1>"),
        (columns.check_marked, "</e1>a<e1> <e2>b</e2>", "has </e1> before <e1>, must have one <e1>...</e1>"),
        (
            columns.check_marked,
            "<e1> </e1> <e2>b</e2>",
            "has nothing in <e1>...</e1>, must have the words of an entity there",
        ),
        (
            columns.check_marked,
            "<e1>a <e2>b</e2></e1>",
            "has <e1>...</e1> and <e2>...</e2> within each other, must have one beside the other",
        ),
        (CHECKS["choices"], None, "is empty"),
        (CHECKS["choices"], "a", "is str 'a', must be a list of texts, one a choice"),
        (CHECKS["choices"], ["a"], "has the one choice 'a', must have two or more"),
        (CHECKS["choices"], ["a", None], "choice 2 is empty"),
        (CHECKS["choices"], ["a", 2], "choice 2 is int 2, must be text"),
        (CHECKS["history"], [], "is empty"),
        (CHECKS["history"], "hi", "is str 'hi', must be a list of texts, one a turn"),
        (CHECKS["history"], ["hi", " "], "turn 2 is empty"),
        (CHECKS["references"], [], "is empty"),
        (CHECKS["references"], [1], "reference 1 is int 1, must be text"),
        (CHECKS["messages"], [], "is empty"),
        (
            CHECKS["messages"],
            "hi",
            """is str 'hi', must be a list of turns such as {"role": "user", "content": "..."}""",
        ),
        (
            CHECKS["messages"],
            [{"from": "human"}],
            """turn 1 is {'from': 'human'}, must be an object such as {"role": "user", "content": "..."}""",
        ),
        (
            CHECKS["messages"],
            [{"role": "bot", "content": "a"}],
            "turn 1 has the role 'bot', must have one of system, user, assistant",
        ),
        (CHECKS["messages"], [*SAID, {"role": "assistant", "content": ""}], "turn 3 has a content that is empty"),
        (CHECKS["messages"], SAID, "has no turn of the role 'assistant', must have one to learn from"),
        (columns.check_open_messages, TURNS[2:], "has no turn of the role 'user' to answer, must end with one"),
        (columns.check_open_messages, TURNS[:1], "has no turn of the role 'user' to answer, must end with one"),
        (CHECKS["answers"], None, "is empty"),
        (
            CHECKS["answers"],
            ["a"],
            """is ['a'], must be an object such as {"text": ["..."], "answer_start": [0]}""",
        ),
        (
            CHECKS["answers"],
            {"text": ["a"], "answer_start": []},
            "has 1 texts but 0 of answer_start, must have one for each",
        ),
        (
            CHECKS["answers"],
            {"text": ["a"], "answer_start": [-1]},
            "answer_start 1 is int -1, must be a character of the context, counted from 0",
        ),
        (CHECKS["answers"], {"text": [""], "answer_start": [0]}, "text 1 is empty"),
        (CHECKS["entry_point"], "add(a, b)", "is 'add(a, b)', must be the name of a function"),
    ],
)
def test_a_bad_value_says_what_would_be_right(check: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(value)


@pytest.mark.parametrize(
    ("text", "start", "message"),
    [
        ("Kyoto", 7, "answer 'Kyoto' is not at 7, where 'in Ky' stands; it stands at 10"),
        ("Kyoto", 11, "answer 'Kyoto' would end at character 16 of a context of 15; it stands at 10"),
        ("Nara", 10, "answer 'Nara' is not at 10, where 'Kyot' stands; it does not occur in the context"),
    ],
)
def test_an_answer_stands_where_it_says(text: str, start: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        columns.check_offsets("born é in Kyoto", {"text": ["é", text], "answer_start": [5, start]})


def test_answers_are_counted_in_characters() -> None:
    columns.check_offsets("born é in Kyoto", {"text": ["é", "Kyoto"], "answer_start": [5, 10]})
    columns.check_offsets("born", {"text": [], "answer_start": []})


def test_a_label_is_one_of_the_choices() -> None:
    columns.check_choice(["a", "b", "c"], 2)
    with pytest.raises(ValueError, match=r"^label 3 is none of the 3 choices; they count from 0 to 2$"):
        columns.check_choice(["a", "b", "c"], 3)


def test_labels_are_sorted_and_numbers_as_numbers() -> None:
    rows = {"train": Dataset.from_dict({"label": ["10", "9", "-1", "b", "a", "9"]})}
    assert labels_of(rows, "label") == ["-1", "9", "10", "a", "b"]


def test_labels_are_read_from_lists() -> None:
    rows = {"train": Dataset.from_dict({"tags": [["O", "B-PER"], ["I-PER"]]})}
    assert labels_of(rows, "tags") == ["B-PER", "I-PER", "O"]


def test_an_unseen_label_is_named_with_its_row_and_the_nearest() -> None:
    rows = {
        "train": Dataset.from_dict({"text": ["a", "b"], "label": ["sports", "news"]}),
        "test": Dataset.from_dict({"text": ["c", "the  text"], "label": ["news", "sport"]}),
    }
    expected = r"split 'test' row 2 \('the text'\): label 'sport' never occurs .*'train'; the nearest is 'sports'"
    with pytest.raises(DataError, match=expected):
        labels_of(rows, "label")


def test_an_unseen_tag_is_named() -> None:
    rows = {
        "train": Dataset.from_dict({"tokens": [["a"]], "tags": [["O"]]}),
        "validation": Dataset.from_dict({"tokens": [["a"], ["b", "c"]], "tags": [["O"], ["O", "B-X"]]}),
    }
    with pytest.raises(DataError, match=r"split 'validation' row 2 .*: tags 'B-X' never occurs"):
        labels_of(rows, "tags")


def test_labels_are_read_from_rows_with_any_number_of_them() -> None:
    rows = {
        "train": Dataset.from_dict({"text": ["a", "b", "c"], "labels": [["joy", "awe"], [], ["fear"]]}),
        "test": Dataset.from_dict({"text": ["a"], "labels": [["joy", "fern"]]}),
    }
    with pytest.raises(DataError, match=r"labels 'fern' never occurs in the 3 classes of .*the nearest is 'fear'"):
        labels_of(rows, "labels")
    assert labels_of({"train": rows["train"]}, "labels") == ["awe", "fear", "joy"]
