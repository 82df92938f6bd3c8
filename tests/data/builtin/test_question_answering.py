"""Questions on invented facts: spans stand where they should, and a reader who tracks pronouns answers all."""

import re
from collections import Counter

from builtin_rows import check_generated, rows_of, splits_of

from niwaki.data.builtin.question_answering import KINDS, InventedFacts

ANY = r"(?:the )?[A-Z][\w ]*?"


def read(context: str) -> dict[tuple[str, str], tuple[str, int]]:
    """What is said: (name, fact) -> (value, its offset), sentence by sentence."""
    said, subject, kind = {}, "", ""
    for sentence in re.finditer(r"[^.]+\.", context):
        text = sentence[0].lstrip()
        start = sentence.end() - len(text)
        matches = []
        for one, facts in KINDS.items():
            for fact, (*patterns, _) in facts.items():
                for pattern in patterns:
                    shape = (
                        re.escape(pattern).replace(r"\{it\}", f"(?P<it>{ANY})").replace(r"\{value\}", "(?P<value>.+)")
                    )
                    if found := re.fullmatch(shape, text):
                        matches.append((one, fact, found))
        pronoun = text.split()[0] in ("He", "She", "It")
        [(kind, fact, found)] = [
            match for match in matches if (match[0] == kind if pronoun else _is_a(match[2]["it"], match[0]))
            and (match[1], match[2]["value"][0].isdigit()) not in (("birthplace", True), ("birthday", False))
        ]  # fmt: skip
        subject = subject if pronoun else re.sub("^The ", "the ", found["it"])
        said[subject, fact] = (found["value"], start + found.start("value"))
    return said


def _is_a(name: str, kind: str) -> bool:
    return kind == ("ship" if name.startswith("The ") else "person" if " " in name else "town")


def test_the_rows_are_as_promised() -> None:
    columns = {"id", "context", "question", "answers"}
    check_generated(InventedFacts(), columns, "397ef3862b26", given=lambda row: row["context"])
    first = splits_of(InventedFacts())["train"][0]
    assert first["context"].startswith(
        "Paul Valasen went to school with Leo Wenadine, who became a dear friend. He was"
    )
    assert first["question"] == "Who is the mayor of Valford?"
    assert first["answers"] == {"text": ["Julia Garonna"], "answer_start": [150]}


def test_answers_stand_at_their_offset_and_ids_differ() -> None:
    rows = rows_of(InventedFacts())
    for row in rows:
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
            assert text == text.strip() != ""
    assert len({row["id"] for row in rows}) == len(rows)


def test_some_contexts_are_long_and_a_fifth_of_the_questions_has_no_answer() -> None:
    for rows in splits_of(InventedFacts()).values():
        lengths = [len(row["context"].split()) for row in rows]
        assert 0.1 < sum(length > 250 for length in lengths) / len(rows) < 0.3
        assert max(lengths) > 350
        assert min(lengths) < 50
        assert 0.13 < sum(not row["answers"]["text"] for row in rows) / len(rows) < 0.28


def test_a_reader_answers_all_and_guesses_do_not() -> None:
    """Exact match: a reader 1; no answer to everything 0.2; the most frequent answers or the first name 0.1 at most."""
    rows = rows_of(InventedFacts())
    asked = {question: fact for facts in KINDS.values() for fact, (*_, question) in facts.items()}
    for row in rows:
        [(fact, name)] = [
            (fact, found["it"]) for question, fact in asked.items()
            if (found := re.fullmatch(re.escape(question).replace(r"\{it\}", f"(?P<it>{ANY})"), row["question"]))
        ]  # fmt: skip
        answer = read(row["context"]).get((name, fact))
        expected = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
        assert ([answer] if answer else []) == expected, row
    answers = Counter(text for row in rows for text in row["answers"]["text"])
    assert answers.most_common(1)[0][1] / len(rows) < 0.1
    names = [re.search(r"[A-Z]\w+ [A-Z]\w+", row["context"]) for row in rows]
    assert sum([found and found[0]] == row["answers"]["text"] for found, row in zip(names, rows, strict=True)) < 200


def test_people_are_she_or_he_and_everything_else_is_it() -> None:
    contexts = {row["context"] for row in rows_of(InventedFacts())}
    text = " ".join(contexts)
    assert len(re.findall(r"\b(She|He) (plays|works|now lives)", text)) > 100
    assert not re.findall(r"\bIt (plays|works|now lives|earns|comes)", text)
    assert not re.findall(r"\b(She|He) (lies|dates|sails|carries|measures|is registered|was launched)", text)
    assert "Laura Valender was born on 1 July. She is a close friend" in text
    assert "Adam Lunelin plays the flute. He was born" in text
