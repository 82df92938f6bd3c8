"""Notes on several topics: each sentence has its topic, and no fixed answer comes far."""

import re
from collections import Counter

from builtin_rows import check_generated, rows_of, splits_of

from niwaki.data.builtin.multi_label import TOPICS, TopicNotes

FIRST = {
    "text": "Please call Ines back on Tuesday. Martin runs nine kilometres before breakfast.",
    "labels": ["sport"],
}


def f1(found: list[list[str]], right: list[list[str]]) -> float:
    """Micro-averaged over all labels of all rows."""
    both = sum(len(set(one) & set(other)) for one, other in zip(found, right, strict=True))
    return 2 * both / (sum(map(len, found)) + sum(map(len, right)))


def read(text: str) -> list[str]:
    """The topics by the patterns that the sentences of a note fit."""
    topics = set()
    for sentence in re.split(r"(?<=\.) ", text):
        for topic, patterns in TOPICS.items():
            shapes = [re.sub(r"\\\{\w+\\\}", "[A-Za-z ]+", re.escape(pattern)) for pattern in patterns]
            if any(re.fullmatch(rf"{shape}\.", sentence, re.IGNORECASE) for shape in shapes):
                topics.add(topic)
    return sorted(topics)


def test_the_rows_are_as_promised() -> None:
    check_generated(TopicNotes(), {"text", "labels"}, "be8e35e9d309", given=lambda row: row["text"])
    assert splits_of(TopicNotes())["train"][0] == FIRST


def test_labels_are_sorted_topics_and_all_are_in_every_split() -> None:
    for rows in splits_of(TopicNotes()).values():
        assert {label for row in rows for label in row["labels"]} == set(TOPICS)
        assert all(row["labels"] == sorted(set(row["labels"])) and row["text"].strip() for row in rows)
    counts = Counter(len(row["labels"]) for row in rows_of(TopicNotes()))
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 150


def test_a_reader_finds_all_and_fixed_answers_find_little() -> None:
    """Micro F1: all topics for every note 0.32, the most frequent one alone 0.16, none 0; by the patterns 1."""
    rows = rows_of(TopicNotes())
    right = [row["labels"] for row in rows]
    assert f1([read(row["text"]) for row in rows], right) == 1
    assert f1([list(TOPICS)] * len(rows), right) < 0.35
    assert max(f1([[topic]] * len(rows), right) for topic in TOPICS) < 0.2
