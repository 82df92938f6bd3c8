"""What `data.columns` can say of a column: another's name, a place within it, or what is made of several.

| written | is |
|---|---|
| `sentence` | the column of that name, whatever the name looks like |
| `translation.en`, `choices.text` | a place within it; of a list of objects, the list of what each holds there |
| `"{premise} Why?"` | a text with the values in it; a list of texts stands there one a line |
| `[option_a, option_b]` | a list of the values |
| `split(tags, ;)` | the parts of a text between the marks, commas where none is given; none of an empty text |
| `position(answer, choices.label)` | where the first value stands in the second, a list; from 0 |
| `placed(answers, context)` | answers, moved to where their text stands in the context; without those that do not |
| `called(code, tests)` | the function that the code defines last of those that the tests call |
"""

import ast
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from niwaki.data.columns import check_answers

Spec = str | Sequence[str]

CALL = re.compile(r"(\w+)\((.*)\)")
FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Origin:
    """The columns of a source that a value is made of, and how; `make` raises ValueError where it cannot be."""

    reads: tuple[str, ...]
    make: Callable[..., Any]

    def of(self, row: dict[str, Any]) -> Any:
        return self.make(*(row[name] for name in self.reads))


def origin_of(spec: Spec, present: Collection[str]) -> Origin:
    """What a spec means for a source with the columns `present`."""
    if not isinstance(spec, str):
        return joined([origin_of(one, present) for one in spec], lambda *values: list(values))
    call = CALL.fullmatch(spec)
    if spec in present:
        return Origin((spec,), lambda value: value)
    if call and call[1] in FUNCTIONS:
        given, make = called_with(call)
        return joined([origin_of(one, present) for one in given], make)
    if FIELD.search(spec):
        fields = [origin_of(name.strip(), present) for name in FIELD.findall(spec)]
        return joined(fields, lambda *values: filled(spec, values))
    root, _, path = spec.partition(".")
    if path and root in present:
        return Origin((root,), lambda value: within(value, path))
    return Origin((spec,), lambda value: value)  # which is not there, as its reader will say


def called_with(call: re.Match[str]) -> tuple[list[str], Callable[..., Any]]:
    """The columns that a function is given, and the function."""
    given = [one.strip() for one in call[2].split(",")]
    if call[1] != "split":
        return given, FUNCTIONS[call[1]]
    return given[:1], partial(split, mark=",".join(given[1:]) or ",")


def joined(parts: Sequence[Origin], make: Callable[..., Any]) -> Origin:
    """`make` of what the parts give."""
    reads = tuple(dict.fromkeys(name for part in parts for name in part.reads))

    def of_values(*values: Any) -> Any:
        row = dict(zip(reads, values, strict=True))
        return make(*(part.of(row) for part in parts))

    return Origin(reads, of_values)


def roots(spec: Spec) -> set[str]:
    """Every column that a spec might read, before it is known which there are."""
    if not isinstance(spec, str):
        return {name for one in spec for name in roots(one)}
    call = CALL.fullmatch(spec)
    inner = called_with(call)[0] if call and call[1] in FUNCTIONS else FIELD.findall(spec)
    return {spec, spec.partition(".")[0]} | {name for one in inner for name in roots(one.strip())}


def within(value: Any, path: str) -> Any:
    """What stands at `a.b` in a value."""
    for name in path.split("."):
        if value is None:
            return None
        if isinstance(value, list):
            value = [within(one, name) for one in value]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            there = f"an object with {', '.join(value)}" if isinstance(value, dict) else f"{type(value).__name__}"
            raise ValueError(f"has no {name!r}, is {there}")
    return value


def filled(template: str, values: Sequence[Any]) -> str | None:
    """The template with the values in the place of its fields; None where all of them are."""
    if all(value is None for value in values):
        return None
    texts = iter(
        "\n".join(map(str, one)) if isinstance(one, list) else "" if one is None else str(one) for one in values
    )
    return FIELD.sub(lambda _: next(texts), template).strip()


def split(value: Any, mark: str) -> list[str]:
    """The parts of a text between the marks, without the blanks around them; none of an empty text."""
    if isinstance(value, list):
        raise ValueError(f"is a list {value!r:.40} already, must be text to split")
    return [] if value is None else [part.strip() for part in str(value).split(mark) if part.strip()]


def position(value: Any, among: Any) -> int | None:
    """Where a value stands in a list, from 0; None for an empty one."""
    if value is None or value == "":
        return None
    if not isinstance(among, list) or value not in among:
        names = ", ".join(map(str, among)) if isinstance(among, list) else among
        raise ValueError(f"is {value!r:.40}, must be one of {names}")
    return among.index(value)


def placed(answers: Any, context: Any) -> dict[str, list]:
    """Answers as they stand in the context: each at the occurrence of its text nearest to where it claims to be.

    Raises:
        ValueError: there are some, and none of them occurs.
    """
    if isinstance(answers, dict) and isinstance(answers.get("answer_start"), list):
        answers = {**answers, "answer_start": [max(start, 0) for start in answers["answer_start"]]}
    given = check_answers(answers)
    kept: dict[str, list] = {"text": [], "answer_start": []}
    for text, start in zip(given["text"], given["answer_start"], strict=True):
        found = [match.start() for match in re.finditer(f"(?={re.escape(text)})", str(context))]
        if found:
            kept["text"].append(text)
            kept["answer_start"].append(min(found, key=lambda place: abs(place - start)))
    if given["text"] and not kept["text"]:
        raise ValueError(f"has no answer that occurs in the context: {given['text'][0]!r:.40}")
    return kept


def called(code: Any, tests: Any) -> str | None:
    """The function that `code` (Python) defines last of those that `tests` calls; None where there is none."""
    try:
        defined = [node.name for node in ast.parse(str(code)).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        raise ValueError(f"cannot be found: the code is no Python: {error.msg} in line {error.lineno}") from None
    text = "\n".join(map(str, tests)) if isinstance(tests, list) else str(tests)
    used = [name for name in defined if re.search(rf"\b{re.escape(name)}\s*\(", text)]
    return used[-1] if used else None


FUNCTIONS: dict[str, Callable[..., Any]] = {"split": split, "position": position, "placed": placed, "called": called}
