"""Everyday questions: one right answer, anywhere among the choices."""

import json
import re
from collections import Counter

from builtin_rows import check_generated, rows_of, splits_of

from niwaki.data.builtin.english import in_words
from niwaki.data.builtin.multiple_choice import KINDS, OPPOSITES, ORDERS, EverydayQuestions

NUMBERS = [in_words(number) for number in range(17)]


def test_the_rows_are_as_promised() -> None:
    given = lambda row: [row["question"], sorted(row["choices"])]  # noqa: E731
    check_generated(EverydayQuestions(), {"question", "choices", "label"}, "c0ec388e22ea", given)
    assert splits_of(EverydayQuestions())["train"][0] == {
        "question": "It is Friday. Which day will it be in one day?",
        "choices": ["Monday", "Tuesday", "Wednesday", "Saturday", "Friday"],
        "label": 3,
    }


def test_there_are_three_to_five_different_choices_and_a_label_among_them() -> None:
    rows = rows_of(EverydayQuestions())
    assert {len(row["choices"]) for row in rows} == {3, 4, 5}
    for row in rows:
        assert 0 <= row["label"] < len(row["choices"]) == len(set(row["choices"]))


def test_every_place_is_as_likely() -> None:
    for size in (3, 4, 5):
        labels = Counter(row["label"] for row in rows_of(EverydayQuestions()) if len(row["choices"]) == size)
        assert min(labels.values()) > 0.8 * labels.total() / size
        assert max(labels.values()) < 1.2 * labels.total() / size


def test_shallow_readers_are_near_chance() -> None:
    """Accuracy: chance 0.26, the first choice 0.25, the longest 0.27, one that the question names 0.23."""
    rows = rows_of(EverydayQuestions())
    chance = sum(1 / len(row["choices"]) for row in rows) / len(rows)
    assert 0.24 < chance < 0.28
    assert abs(sum(row["label"] == 0 for row in rows) / len(rows) - chance) < 0.03
    longest = [max(range(len(row["choices"])), key=lambda place, row=row: len(row["choices"][place])) for row in rows]
    assert sum(place == row["label"] for place, row in zip(longest, rows, strict=True)) / len(rows) < 0.3
    overlap = [
        max(range(len(row["choices"])), key=lambda n, row=row: row["choices"][n].split()[-1] in row["question"])
        for row in rows
    ]
    assert sum(place == row["label"] for place, row in zip(overlap, rows, strict=True)) / len(rows) < 0.3


def test_the_right_choice_is_right_and_the_only_one() -> None:
    kinds = Counter()
    for row in rows_of(EverydayQuestions()):
        question, right = row["question"], row["choices"][row["label"]]
        wrong = [choice for choice in row["choices"] if choice != right]
        if found := re.fullmatch(r"Which of these is (not )?an? (.+)\?", question):
            kinds["kind"] += 1
            members = KINDS[found[2]]
            assert (right in members, {choice in members for choice in wrong}) == (not found[1], {bool(found[1])})
        elif found := re.fullmatch(r"Which of these is the (.+)\?", question):
            kinds["order"] += 1
            [(ends, things)] = [(ends, things) for ends, things in ORDERS.items() if found[1] in ends]
            places = [things.index(choice) for choice in row["choices"]]
            assert things.index(right) == (max(places) if found[1] == ends[1] else min(places))
        elif found := re.fullmatch(r"What is the opposite of (.+)\?", question):
            kinds["opposite"] += 1
            both = OPPOSITES | {other: word for word, other in OPPOSITES.items()}
            assert both[found[1]] == right
            assert both[right] == found[1]
        elif found := re.fullmatch(r".* at (\w+) o'clock and takes (\w+) hours\. When does it end\?", question):
            kinds["hours"] += 1
            assert right == f"at {NUMBERS[NUMBERS.index(found[1]) + NUMBERS.index(found[2])]} o'clock"
        elif found := re.fullmatch(r"\w+ has (\w+) \w+ and (gives|gets) (\w+) .*\?", question):
            kinds["sum"] += 1
            sign = 1 if found[2] == "gets" else -1
            assert right == NUMBERS[NUMBERS.index(found[1]) + sign * NUMBERS.index(found[3])]
    assert min(kinds[kind] for kind in ("kind", "order", "opposite", "hours", "sum")) > 100
    assert json.dumps(KINDS).count('"') == 2 * (len(KINDS) + len({thing for kind in KINDS.values() for thing in kind}))


def test_days_and_months_are_counted_around_the_end() -> None:
    answers = {row["question"]: row["choices"][row["label"]] for row in rows_of(EverydayQuestions())}
    expected = {
        "It is Saturday. Which day will it be in two days?": "Monday",
        "It is Monday. Which day was it three days ago?": "Friday",
        "It is January. Which month was it three months ago?": "October",
        "It is November. Which month will it be in two months?": "January",
    }
    found = {question: answers[question] for question in expected if question in answers}
    assert len(found) >= 2
    assert found == {question: expected[question] for question in found}
