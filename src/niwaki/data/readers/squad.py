"""Questions on paragraphs as SQuAD is published (Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822), and
CMRC 2018 (Cui et al. 2019, arXiv:1810.07366)."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from niwaki.data.readers.rows import Rows, rows_from, text_of
from niwaki.errors import DataError

SHAPE = '{"data": [{"paragraphs": [{"context": "...", "qas": [{"question": "...", "id": "...", "answers": [...]}]}]}]}'


def read_squad(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """Columns context, question, id and answers, a row for each question; `is_impossible` ones have no answer."""
    import json

    try:
        content = json.loads(text_of(path, origin))
    except json.JSONDecodeError as error:
        raise DataError(f"{origin} line {error.lineno}: not JSON: {error.msg}") from None
    if not is_squad(content):
        raise DataError(f"{origin}: is no SQuAD file, must be {SHAPE}")
    return rows_of(content, origin, wanted)


def is_squad(content: Any) -> bool:
    """Whether a JSON value has articles with paragraphs, as SQuAD has."""
    articles = content.get("data") if isinstance(content, dict) else None
    return (
        isinstance(articles, list)
        and bool(articles)
        and all(isinstance(article, dict) and "paragraphs" in article for article in articles)
    )


def rows_of(content: dict[str, Any], origin: str, wanted: Collection[str]) -> Rows:
    """The questions of a SQuAD file, in its order, counted from 1."""
    rows = list(questions(content, origin, answered="answers" in wanted))
    names = ("context", "question", "answers", "id")
    columns = {name: [row[name] for row in rows] for name in names if any(row[name] is not None for row in rows)}
    return rows_from(columns, list(range(1, len(rows) + 1)), origin, wanted, unit="question")


def questions(content: dict[str, Any], origin: str, *, answered: bool) -> Iterator[dict[str, Any]]:
    """A row for each question; None for what was not to be read."""
    number = 0
    for place, paragraph in paragraphs(content, origin):
        context = part(paragraph, "context", str, place)
        for asked in part(paragraph, "qas", list, place):
            number += 1
            where = f"{origin} question {number}"
            yield {
                "context": context,
                "question": part(asked, "question", str, where),
                "answers": answers_of(asked, where) if answered else None,
                "id": None if asked.get("id") is None else str(asked["id"]),
            }


def paragraphs(content: dict[str, Any], origin: str) -> Iterator[tuple[str, Any]]:
    """Each paragraph, and where it stands, for errors."""
    for number, article in enumerate(content["data"], start=1):
        for count, paragraph in enumerate(part(article, "paragraphs", list, f"{origin} article {number}"), start=1):
            yield f"{origin} article {number} paragraph {count}", paragraph


def answers_of(asked: dict[str, Any], where: str) -> dict[str, list]:
    """The answers to a question, as the column `answers` has them."""
    given = asked.get("answers")
    if asked.get("is_impossible"):
        if given:
            raise DataError(f"{where}: is_impossible is true, but it has answers; leave one out")
        given = []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise DataError(
            f'{where}: answers is {given!r:.40}, must be a list such as [{{"text": "...", "answer_start": 0}}]'
        )
    return {
        "text": [part(one, "text", str, f"{where} answer {i}") for i, one in enumerate(given, start=1)],
        "answer_start": [part(one, "answer_start", int, f"{where} answer {i}") for i, one in enumerate(given, start=1)],
    }


def part(value: Any, name: str, kind: type, place: str) -> Any:
    """What an object holds under a name, which must be of this kind."""
    words = {str: "text", list: "a list", int: "a whole number"}
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {value!r:.40}, must be an object with {name!r}")
    if name not in value:
        raise DataError(f"{place}: has no {name!r}; the file must be {SHAPE}")
    if not isinstance(value[name], kind) or isinstance(value[name], bool):
        raise DataError(f"{place}: {name} is {type(value[name]).__name__} {value[name]!r:.40}, must be {words[kind]}")
    return value[name]
