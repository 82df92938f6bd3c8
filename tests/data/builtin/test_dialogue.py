"""Talks on errands: the response follows from the history, and from more of it than the last turn."""

import re
from collections import Counter, defaultdict

import pytest
from builtin_rows import check_generated, rows_of, splits_of

from niwaki.data.builtin.dialogue import PRICES, STREET, ErrandTalks, _way

COUNTS = {"a": 1, "two": 2, "three": 3}


def test_the_rows_are_as_promised() -> None:
    check_generated(ErrandTalks(), {"history", "response"}, "64021ab91d3f", given=lambda row: row["history"])
    assert splits_of(ErrandTalks())["train"][0] == {
        "history": [
            "Hello, I would like three muffins, please.",
            "Anything else?",
            "And three muffins and two lemonades, please.",
            "Anything else?",
            "I have changed my mind: please leave out the lemonades.",
        ],
        "response": "Fine, without the lemonades. Anything else?",
    }


def test_a_guest_begins_and_has_the_last_turn() -> None:
    for row in rows_of(ErrandTalks()):
        assert len(row["history"]) % 2 == 1
        assert all(turn[0].isupper() and turn[-1] in ".?" for turn in [*row["history"], row["response"]])


def test_what_was_said_before_the_last_turn_counts() -> None:
    """Share of right responses: the most frequent one 0.19, the best one to each last turn known by heart 0.52."""
    rows = rows_of(ErrandTalks())
    assert Counter(row["response"] for row in rows).most_common(1)[0][1] / len(rows) < 0.3
    by_last = defaultdict(Counter)
    for row in rows:
        by_last[row["history"][-1]][row["response"]] += 1
    assert sum(max(counts.values()) for counts in by_last.values()) / len(rows) < 0.6
    final = by_last["Yes, that is right."] + by_last["No, that is all."]
    assert len(final) > 200


def test_bills_are_added_up_by_what_was_ordered_and_left_out() -> None:
    checked = changed = 0
    for row in rows_of(ErrandTalks()):
        orders: Counter[str] = Counter()
        for turn in row["history"][::2]:
            if turn.startswith(("Hello, I would like ", "And ", "Then ")) and "table" not in turn:
                for count, thing in re.findall(r"\b(a|two|three) ([a-z]+)", turn):
                    orders[next(name for name in PRICES if thing.startswith(name))] += COUNTS[count]
            elif found := re.search(r"leave out the (\w+)\.", turn):
                del orders[next(name for name in PRICES if found[1].startswith(name))]
        total = sum(PRICES[thing] * count for thing, count in orders.items())
        if found := re.search(r"(\d+) euros, please\.$", row["response"]):
            checked += 1
            assert int(found[1]) == total
        elif found := re.search(r"and (\d+) euros change\.$", row["response"]):
            changed += 1
            assert int(found[1]) == int(re.search(r"\d+", row["history"][-1])[0]) - total
    assert min(checked, changed) > 80


def test_a_table_is_confirmed_as_it_was_asked_for() -> None:
    checked = 0
    for row in rows_of(ErrandTalks()):
        if found := re.match(
            r"That is a table for (\w+) on (\w+) at (\w+), under the name of (\w+)\.", row["response"]
        ):
            said = " ".join(row["history"][::2])
            assert all(re.search(rf"\b{value}\b", said, re.IGNORECASE) for value in found.groups())
            last = re.match(r"Sorry, could you make it (?:a table for )?(\w+)", row["history"][-1])
            assert last is None or last[1] in found.groups()
            checked += 1
    assert checked > 50


def test_ways_along_the_street() -> None:
    assert STREET[:4] == ["bank", "bakery", "church", "cinema"]
    assert _way("bank", "bakery") == "Go east along Main Street. The bakery is the next house."
    far = "Go west along Main Street. The bank is three houses further on, just after the bakery."
    assert _way("cinema", "bank") == far
    ways = [row for row in rows_of(ErrandTalks()) if "Main Street" in row["response"]]
    assert len(ways) > 100
    for row in ways:
        places = [re.findall(rf"\b(?:{'|'.join(STREET)})\b", turn) for turn in row["history"]]
        goal = re.search(r"The (\w+) is", row["response"])[1]
        assert goal in (places[0] + places[2] if len(row["history"]) == 3 else places[-1] + places[2])


@pytest.mark.parametrize("fact", ["For how many people?", "For which day?", "At what time?"])
def test_what_was_given_is_not_asked_for(fact: str) -> None:
    given = {"For how many people?": r" for \w+", "For which day?": r" on \w+day", "At what time?": r" at \w+"}[fact]
    asked = [row["history"][0] for row in rows_of(ErrandTalks()) if row["response"] == fact]
    assert len(asked) > 20
    assert not [opening for opening in asked if re.search(given, opening)]
