"""Conversations as they are published for instruction tuning: turns by role (OpenAI), turns by speaker (ShareGPT),
instruction, input and output (Alpaca: Taori et al. 2023)."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from niwaki.data.readers.json_rows import objects_of
from niwaki.data.readers.rows import Rows, rows_from
from niwaki.errors import DataError

SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
Turns = list[dict[str, str]]


def read_chat(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """Column messages, of a JSON list of conversations or of one a line: {"messages": [{"role", "content"}]},
    {"conversations": [{"from", "value"}]} or {"instruction", "input", "output"}; a "system" beside the last two stands
    first, and pairs of a "history" before the instruction."""
    objects, numbers, unit = objects_of(path, origin)
    messages = [turns_of(value, f"{origin} {unit} {n}") for value, n in zip(objects, numbers, strict=True)]
    return rows_from({"messages": messages} if messages else {}, numbers, origin, wanted, unit=unit)


def turns_of(value: dict[str, Any], place: str) -> Turns:
    """The turns of one conversation.

    Raises:
        DataError: it has none of the three forms.
    """
    try:
        if "messages" in value:
            return [by_role(turn, f"turn {i}") for i, turn in enumerate(listed(value, "messages"), start=1)]
        first = [{"role": "system", "content": text(value, "system", "the row")}] if value.get("system") else []
        if "conversations" in value:
            said = enumerate(listed(value, "conversations"), start=1)
            return first + [by_speaker(turn, f"turn {i}") for i, turn in said]
        if "instruction" in value and "output" in value:
            return first + alpaca(value)
    except ValueError as wrong:
        raise DataError(f"{place}: {wrong}") from None
    raise DataError(
        f"{place}: has {', '.join(value) or 'nothing'}; a conversation has messages, conversations, or instruction and "
        "output"
    )


def by_role(turn: Any, place: str) -> dict[str, str]:
    return {"role": text(turn, "role", place), "content": text(turn, "content", place)}


def by_speaker(turn: Any, place: str) -> dict[str, str]:
    speaker = text(turn, "from", place)
    if speaker not in SPEAKERS:
        raise ValueError(f"{place} is from {speaker!r:.40}, must be from one of {', '.join(SPEAKERS)}")
    return {"role": SPEAKERS[speaker], "content": text(turn, "value", place)}


def alpaca(value: dict[str, Any]) -> Turns:
    """Each earlier exchange, and the instruction, with its input on the next line where it has one."""
    turns: Turns = []
    for number, exchange in enumerate(value.get("history") or [], start=1):
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(one, str) for one in exchange):
            raise ValueError(f"history {number} is {exchange!r:.40}, must be a list of what was asked and answered")
        turns += pair(*exchange)
    given = text(value, "input", "the row") if value.get("input") else ""
    asked = text(value, "instruction", "the row")
    return turns + pair("\n".join(part for part in (asked, given) if part), text(value, "output", "the row"))


def pair(asked: str, answered: str) -> Turns:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def listed(value: dict[str, Any], name: str) -> list:
    if not isinstance(value[name], list):
        raise ValueError(f"{name} is {type(value[name]).__name__} {value[name]!r:.40}, must be a list of turns")
    return value[name]


def text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, dict) or name not in value:
        raise ValueError(f"{place} is {value!r:.40}, must be an object with {name!r}")
    if not isinstance(value[name], str):
        raise ValueError(f"{place} has {name} {value[name]!r:.40}, must be text")
    return str(value[name])
