"""Instructions on words: every answer is right, worked out anew here."""

import re
from collections import Counter

from builtin_rows import check_generated, rows_of, splits_of

from niwaki.data.builtin.instruction import WordTasks

NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


def answer(question: str, before: str) -> str:
    """What a patient reader would say; `before` is the last answer."""
    listing = re.search(r"[a-z]+(?:, [a-z]+){2,4}", question)
    words = listing[0].split(", ") if listing else []
    said = before.split(", ")
    by_start = {
        "Now only the first": lambda: said[0],
        "Now only the last": lambda: said[-1],
        "Now leave out the last": lambda: ", ".join(said[:-1]),
        "And how many": lambda: {1: "one", 2: "two", **NUMBERS}[len(said)],
        "Now in the opposite order": lambda: ", ".join(said[::-1]),
        "Sort these": lambda: ", ".join(sorted(words)),
        "Write these words in the opposite": lambda: ", ".join(words[::-1]),
        "Reverse": lambda: ", ".join(words[::-1]),
        "Spell": lambda: ", ".join("".join(reversed(word)) for word in words),
        "Turn": lambda: ", ".join("".join(reversed(word)) for word in words),
        "Write these words in capital": lambda: ", ".join(word.upper() for word in words),
        "Leave out": lambda: ", ".join(words[1:]),
        "How many words": lambda: NUMBERS[len(words)],
        "Count these": lambda: NUMBERS[len(words)],
        "Which of these words is the last": lambda: words[-1],
        "Name the last": lambda: words[-1],
        "Which of these words comes first": lambda: sorted(words)[0],
        "Pick": lambda: sorted(words)[0],
        "What are the first": lambda: ", ".join(word[0] for word in words),
        "Give the first": lambda: ", ".join(word[0] for word in words),
        "How many letters": lambda: NUMBERS[len(words[0])],
        "Count the letters": lambda: NUMBERS[len(words[0])],
    }
    if question.startswith("Put "):
        return ", ".join(sorted(words)) if "order" in question else ", ".join(word.upper() for word in words)
    if question.startswith("Write ") and not question.startswith("Write these"):
        return ", ".join(words[1:])
    [found] = [make for start, make in by_start.items() if question.startswith(start)]
    return found()


def test_the_rows_are_as_promised() -> None:
    check_generated(WordTasks(), {"messages"}, "9d76befb8c28", given=lambda row: row["messages"])
    assert splits_of(WordTasks())["train"][0]["messages"] == [
        {"role": "user", "content": "Which of these words is the last one: apple, stone, pepper, island?"},
        {"role": "assistant", "content": "island"},
    ]


def test_roles_take_turns_and_some_begin_with_a_system_message() -> None:
    for rows in splits_of(WordTasks()).values():
        roles = Counter(tuple(message["role"] for message in row["messages"]) for row in rows)
        turn = ("user", "assistant")
        assert set(roles) == {turn, turn * 2, ("system", *turn), ("system", *turn * 2)}
        assert 0.3 < sum(count for one, count in roles.items() if one[0] == "system") / len(rows) < 0.5
        assert 0.15 < sum(count for one, count in roles.items() if one.count("user") == 2) / len(rows) < 0.4


def test_every_answer_is_right_and_in_the_form_that_the_system_asks_for() -> None:
    forms = {"End": "{}.", "Put": '"{}"', "Begin": "Answer: {}", "You": "{}"}
    for row in rows_of(WordTasks()):
        system, *rest = row["messages"] if row["messages"][0]["role"] == "system" else [None, *row["messages"]]
        form = forms[system["content"].split()[0]] if system else "{}"
        plain = ""
        for asked, said in zip(rest[::2], rest[1::2], strict=True):
            plain = answer(asked["content"], plain)
            assert said["content"] == form.format(plain), row


def test_repeating_the_words_is_hardly_ever_right() -> None:
    """Exact match of the last answer: the words as they were given 0.01, the most frequent answer 0.05."""
    rows = rows_of(WordTasks())
    last = [row["messages"][-1]["content"] for row in rows]
    given = [re.search(r"[a-z]+(?:, [a-z]+){2,4}", str(row["messages"]))[0] for row in rows]
    assert sum(one == other for one, other in zip(last, given, strict=True)) / len(rows) < 0.05
    assert Counter(last).most_common(1)[0][1] / len(rows) < 0.15
