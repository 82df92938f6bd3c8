"""The labels of a column."""

import pytest
from datasets import Dataset

from niwaki.data.columns import labels_of
from niwaki.errors import DataError


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
