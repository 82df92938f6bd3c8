"""What a value of each known column must be, what values of a row must be to each other, and the labels of a column.

A check takes the raw value and returns the canonical one; ValueError says what is wrong, and what would be right.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from niwaki.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def check_text(value: Any) -> str:
    """A string with something in it; ValueError says what is wrong."""
    if value is None:
        raise ValueError("is empty")
    if not isinstance(value, str):
        raise ValueError(f"is {type(value).__name__} {value!r:.40}, must be text")
    if not value.strip():
        raise ValueError("is empty")
    return value


def check_label(value: Any) -> str:
    """A class as text: names stay, numbers and booleans become their decimal or name."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("is empty")
    if not isinstance(value, str | int | float):
        raise ValueError(f"is {type(value).__name__}, must be text or a number")
    if not str(value).strip():
        raise ValueError("is empty")
    return str(value)


def check_words(value: Any) -> list[str]:
    """A list with at least one word, each a string with something in it."""
    if value is None or (isinstance(value, list) and not value):
        raise ValueError("is empty")
    if not isinstance(value, list):
        raise ValueError(f"is {type(value).__name__} {value!r:.40}, must be a list of words")
    for position, word in enumerate(value, start=1):
        if not isinstance(word, str):
            raise ValueError(f"has {type(word).__name__} {word!r:.40} as word {position}, must be text")
        if not word.strip():
            raise ValueError(f"has an empty word at {position}")
    return value


def check_labels(value: Any) -> list[str]:
    """A list of classes, none twice, as text; it may be empty."""
    if isinstance(value, str):
        raise ValueError(f"is text {value!r:.40}, must be a list of labels; split(COLUMN, ;) is one of what ; parts")
    labels = [check_part(one, check_label, "label", i) for i, one in enumerate(check_list(value, "labels"), start=1)]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"has {label!r} twice, must name each label once")
    return labels


def check_number(value: Any) -> float:
    """A finite number, or text that reads as one."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"is {type(value).__name__} {value!r:.40}, must be a finite number")
    return number


def check_index(value: Any) -> int:
    """Which of the choices, from 0, as a number or as the letter A, B, ...; `check_choice` compares it to them."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty")
    if isinstance(value, str) and re.fullmatch("[A-Z]", value.strip()):
        return ord(value.strip()) - ord("A")
    return _whole(value, "the number of a choice, counted from 0, or its letter")


def check_zero_or_one(value: Any) -> int:
    """0 or 1, as a number, as text or as a boolean."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("is empty")
    number = int(value) if isinstance(value, bool) else _whole(value, "0 or 1")
    if number > 1:
        raise ValueError(f"is {value!r}, must be 0 or 1")
    return number


def _whole(value: Any, right: str) -> int:
    try:
        number = check_number(value)
    except ValueError:
        number = -1.0
    if number < 0 or number != int(number):
        raise ValueError(f"is {type(value).__name__} {value!r:.40}, must be {right}")
    return int(number)


def check_marked(value: Any) -> str:
    """A text with one <e1>...</e1> and one <e2>...</e2>, each around something, neither within the other."""
    text = check_text(value)
    spans = []
    for name in ("e1", "e2"):
        first, last = f"<{name}>", f"</{name}>"
        for mark in (first, last):
            if text.count(mark) != 1:
                found = f"{text.count(mark)} times" if mark in text else "nowhere"
                raise ValueError(f"has {mark} {found}, must have one {first}...{last}")
        start, end = text.index(first) + len(first), text.index(last)
        if end < start:
            raise ValueError(f"has {last} before {first}, must have one {first}...{last}")
        if not text[start:end].strip():
            raise ValueError(f"has nothing in {first}...{last}, must have the words of an entity there")
        spans.append((start, end))
    if max(start for start, _ in spans) < min(end for _, end in spans):
        raise ValueError("has <e1>...</e1> and <e2>...</e2> within each other, must have one beside the other")
    return text


def check_choices(value: Any) -> list[str]:
    """A list of two or more texts."""
    choices = check_texts(value, "choice")
    if len(choices) < 2:
        raise ValueError(f"has the one choice {choices[0]!r:.40}, must have two or more")
    return choices


def check_history(value: Any) -> list[str]:
    """What was said before, or chosen: a list of one text or more, the oldest first."""
    return check_texts(value, "turn")


def check_references(value: Any) -> list[str]:
    """Texts of which each would be right: a list of one or more."""
    return check_texts(value, "reference")


def check_texts(value: Any, kind: str) -> list[str]:
    """A list of one text or more, each called a `kind`."""
    texts = check_list(value, f"texts, one a {kind}")
    if not texts:
        raise ValueError("is empty")
    return [check_part(text, check_text, kind, number) for number, text in enumerate(texts, start=1)]


def check_list(value: Any, of: str) -> list:
    """A list of anything."""
    if value is None:
        raise ValueError("is empty")
    if not isinstance(value, list):
        raise ValueError(f"is {type(value).__name__} {value!r:.40}, must be a list of {of}")
    return value


def check_part(value: Any, check: Callable[[Any], Any], kind: str, number: int) -> Any:
    """What `check` makes of one of the values in a list; errors call it the `kind` of that number."""
    try:
        return check(value)
    except ValueError as wrong:
        raise ValueError(f"{kind} {number} {wrong}") from None


ROLES = ("system", "user", "assistant")


def check_turns(value: Any) -> list[dict[str, str]]:
    """Turns of a conversation, each {"role": ..., "content": ...}; what else they hold is left out."""
    turns = check_list(value, 'turns such as {"role": "user", "content": "..."}')
    if not turns:
        raise ValueError("is empty")
    return [check_part(turn, _check_turn, "turn", number) for number, turn in enumerate(turns, start=1)]


def _check_turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise ValueError(f'is {turn!r:.60}, must be an object such as {{"role": "user", "content": "..."}}')
    if turn["role"] not in ROLES:
        raise ValueError(f"has the role {turn['role']!r:.40}, must have one of {', '.join(ROLES)}")
    try:
        return {"role": turn["role"], "content": check_text(turn["content"])}
    except ValueError as wrong:
        raise ValueError(f"has a content that {wrong}") from None


def check_messages(value: Any) -> list[dict[str, str]]:
    """Turns of a conversation to learn from: one of them is the assistant's."""
    turns = check_turns(value)
    if all(turn["role"] != "assistant" for turn in turns):
        raise ValueError("has no turn of the role 'assistant', must have one to learn from")
    return turns


def check_open_messages(value: Any) -> list[dict[str, str]]:
    """Turns of a conversation to go on with, without the assistant's turns at their end."""
    turns = check_turns(value)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        raise ValueError("has no turn of the role 'user' to answer, must end with one")
    return turns


def check_answers(value: Any) -> dict[str, list]:
    """{"text": [...], "answer_start": [...]}, both empty where there is no answer; `check_offsets` compares them to the
    context."""
    if value is None:
        raise ValueError("is empty")
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
        raise ValueError(f'is {value!r:.60}, must be an object such as {{"text": ["..."], "answer_start": [0]}}')
    texts, starts = (check_list(value[name], "texts or of numbers") for name in ("text", "answer_start"))
    if len(texts) != len(starts):
        raise ValueError(f"has {len(texts)} texts but {len(starts)} of answer_start, must have one for each")
    return {
        "text": [check_part(text, check_text, "text", number) for number, text in enumerate(texts, start=1)],
        "answer_start": [
            check_part(start, lambda one: _whole(one, "a character of the context, counted from 0"), "answer_start", i)
            for i, start in enumerate(starts, start=1)
        ],
    }


def check_entry_point(value: Any) -> str:
    """The name of a function in Python."""
    name = check_text(value).strip()
    if not name.isidentifier():
        raise ValueError(f"is {name!r:.40}, must be the name of a function")
    return name


# What a model finds or is compared to: no model is given these.
KEPT_BACK = (
    "label", "labels", "tags", "answers", "target", "references", "response", "solution", "tests", "entry_point",
)  # fmt: skip
ANSWERS = ("label", "tags")  # those that a teacher can say in place of the data
NAMES = ("id",)  # what a row is called; no model reads it

CHECKS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("text", "text_pair", "context", "question", "source", "target", "response", "prompt", "solution", "tests"),
        check_text,
    ),
    "candidate": check_text,
    "label": check_label,
    "id": check_label,
    "labels": check_labels,
    "tokens": check_words,
    "tags": check_words,
    "answers": check_answers,
    "choices": check_choices,
    "history": check_history,
    "references": check_references,
    "messages": check_messages,
    "entry_point": check_entry_point,
}
ASKING: dict[str, Callable[[Any], Any]] = {"messages": check_open_messages}  # of rows that are to be answered

# How a column is filled by a text alone, where that is all there is.
OF_PLAIN_TEXT: dict[str, Callable[[str], Any]] = {
    "history": lambda text: [text],
    "messages": lambda text: [{"role": "user", "content": text}],
}
EXAMPLES: dict[str, Any] = {
    "tokens": ["...", "..."],
    "choices": ["...", "..."],
    "history": ["..."],
    "messages": [{"role": "user", "content": "..."}],
}


def check_same_length(tokens: list[str], tags: list[str]) -> None:
    """A tag for each token."""
    if len(tokens) != len(tags):
        raise ValueError(f"{len(tokens)} tokens but {len(tags)} tags; give one tag a token")


def check_offsets(context: str, answers: dict[str, list]) -> None:
    """Each answer stands in the context where it says, counted in characters."""
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if start + len(text) > len(context):
            raise ValueError(
                f"answer {text!r:.40} would end at character {start + len(text)} of a context of {len(context)}"
                f"; {_where(text, context)}"
            )
        if not context.startswith(text, start):
            there = context[start : start + len(text)]
            raise ValueError(
                f"answer {text!r:.40} is not at {start}, where {there!r:.40} stands; {_where(text, context)}"
            )


def _where(text: str, context: str) -> str:
    place = context.find(text)
    return "it does not occur in the context" if place < 0 else f"it stands at {place}"


def check_choice(choices: list[str], label: Any) -> None:
    """The label is the number of one of the choices, counted from 0."""
    if check_index(label) >= len(choices):
        raise ValueError(
            f"label {label} is none of the {len(choices)} choices; they count from 0 to {len(choices) - 1}"
        )


# What two columns of a row must be to each other.
TOGETHER: dict[tuple[str, str], Callable[[Any, Any], None]] = {
    ("tokens", "tags"): check_same_length,
    ("context", "answers"): check_offsets,
    ("choices", "label"): check_choice,
}


def values_of(rows: "Dataset", column: str, *, codes: bool = False) -> list:
    """A column as Python values, with ClassLabel codes, alone or in lists, as the names of their classes; with `codes`
    as they are."""
    from datasets import ClassLabel, LargeList, List

    values = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    feature = rows.features[column]
    inner = feature.feature if isinstance(feature, List | LargeList) else feature
    if not isinstance(inner, ClassLabel):
        return values
    return [_named(value, range(len(inner.names)) if codes else inner.names) for value in values]


def _named(value: Any, names: Sequence[Any]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    # -1 is how published test sets mark rows whose answer is kept back.
    return names[value] if value is not None and 0 <= value < len(names) else None


def labels_of(
    splits: "Mapping[str, Dataset]", column: str, place: Callable[[str, int], str] | None = None
) -> list[str]:
    """The sorted labels of the training split; numbers sort as numbers.

    `column` holds one label a row ("label") or a list of them ("labels", "tags"). Raises DataError where another split
    has a label that training never saw; `place` says where a row of a split stands, by its number from 1.
    """
    known = {label for labels in _label_lists(splits["train"], column) for label in labels}
    ordered = sorted(known, key=_sort_key)
    for split, rows in splits.items():
        for number, labels in enumerate(_label_lists(rows, column), start=1):
            for label in labels:
                if label not in known:
                    at = place(split, number) if place else f"split {split!r} row {number}"
                    raise DataError(f"{at}{_unseen(rows[number - 1], column, label, ordered)}")
    return ordered


def _label_lists(rows: "Dataset", column: str) -> list[list[str]]:
    values = rows[column][:]
    return [value if isinstance(value, list) else [value] for value in values]


def _unseen(row: dict[str, Any], column: str, label: str, ordered: list[str]) -> str:
    near = nearest(label, ordered)
    text = next((str(value) for name, value in row.items() if name != column), "")
    start = f" ({' '.join(text.split())[:40]!r})" if text else ""
    return (
        f"{start}: {column} {label!r} never occurs in the {len(ordered)} "
        f"{'tags' if column == 'tags' else 'classes'} of split 'train'; the nearest is {near!r}"
    )


def _sort_key(label: str) -> tuple[int, float, str]:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
