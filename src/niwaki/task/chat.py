"""Talks as a model reads them: the tokenizer's chat template, cut where the assistant's turns begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

from niwaki.errors import ConfigError, DataError
from niwaki.task.layout import end_of

Message = dict[str, str]  # role, content
Turns = Literal["all", "last"]

# For a tokenizer that has none; it is saved with the tokenizer.
DEFAULT = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + (eos_token if message['role'] == 'assistant' else '\\n') }}"
    "{% endfor %}"
    "{{ 'assistant:' if add_generation_prompt else '' }}"
)


def template_of(tokenizer: Any) -> str:
    """The tokenizer's own template, else the default one."""
    own = tokenizer.chat_template
    return own if isinstance(own, str) else own["default"] if isinstance(own, dict) and "default" in own else DEFAULT


def rendered(messages: Sequence[Message], tokenizer: Any, *, asked: bool = False) -> str:
    """A talk as text; `asked`: up to where the assistant's next turn begins.

    Raises:
        ConfigError: the template refuses it.
    """
    from jinja2 import TemplateError

    if not messages:
        return ""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=asked, chat_template=template_of(tokenizer)
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(f"the chat template of the tokenizer refuses the roles {roles} ({error})") from None
    return text


def special_texts(tokenizer: Any) -> list[str]:
    """The texts that are read as special tokens wherever they stand."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def check_spelling(messages: Sequence[Message], special: Sequence[str]) -> None:
    """Raise DataError where a message spells a special token, and so would end its turn or begin another's. What a
    template writes around it is read in one pass with it, so the one cannot be told from the other."""
    for message in messages:
        for token in special:
            if any(token in text for text in message.values()):
                raise DataError(
                    f"messages: {message['role']} says {message['content'][:40]!r}, which holds {token!r}, a special "
                    "token of this model, and would be read as one; leave it out, or write it otherwise"
                )


def parts(messages: Sequence[Message], tokenizer: Any, turns: Turns) -> list[tuple[str, bool]]:
    """A talk whose last turn is the assistant's, in pieces: (text, whether the assistant says it). What stands behind
    the mark that ends a turn is not the assistant's, be it a line break.

    Raises:
        ConfigError: the template writes a turn otherwise once others follow, so that its place cannot be told.
    """
    whole = rendered(messages, tokenizer)
    found, done = [], 0
    for number, message in enumerate(messages):
        last = number == len(messages) - 1
        if message["role"] != "assistant" or (turns == "last" and not last):
            continue
        before = rendered(messages[:number], tokenizer, asked=True)
        behind = whole if last else rendered(messages[: number + 1], tokenizer)
        if not whole.startswith(behind) or not behind.startswith(before) or len(before) < done:
            raise ConfigError(
                "task.turns=all: the chat template of the tokenizer writes a turn otherwise once others follow it; "
                "needs last"
                if not last
                else "the chat template of the tokenizer writes what it adds for an answer otherwise once there is one"
            )
        said = behind[len(before) :].rstrip()
        found += [(whole[done : len(before)], False), (said, True)]
        done = len(before) + len(said)
    return found


def tokens_of(
    messages: Sequence[Message], tokenizer: Any, turns: Turns, most: int
) -> tuple[list[int], list[bool], list[int]]:
    """The tokens before the last answer, which of them an earlier answer says, and those of the last answer, at most
    `most`; the tokenizer's end token ends an answer where the template has none."""
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts, says = zip(*parts(messages, tokenizer, turns), strict=True)
    pieces = []
    for ids, said in zip(encoded(texts, tokenizer), says, strict=True):
        ended = not said or (ids and ids[-1] in known)
        pieces.append((ids if ended else [*ids, end_of(tokenizer)], said))
    *earlier, (answer, _) = pieces
    if len(answer) > most:
        answer = [*answer[: most - 1], answer[-1]]
    before = [token for ids, _ in earlier for token in ids]
    return before, [said for ids, said in earlier for _ in ids], answer


def encoded(texts: Sequence[str], tokenizer: Any, lead: str = "") -> list[list[int]]:
    """The tokens of each piece of a text, as the whole text has them, the special ones that it spells among them.

    A model that answers is given what stands before a piece, and no token that crosses into it; the text is cut where
    one would. What is cut off is encoded behind `lead`, an end token, since a tokenizer may write the beginning of a
    text otherwise than its middle.
    """
    edges = list(accumulate(map(len, texts), initial=len(lead)))
    found = tokenizer(
        lead + "".join(texts), add_special_tokens=False, split_special_tokens=False, return_attention_mask=False,
        return_offsets_mapping=True, verbose=False,
    )  # fmt: skip
    pieces: list[list[int]] = [[] for _ in texts]
    reach, number = len(lead), 0
    for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if lead and stop <= len(lead):
            continue
        while stop > edges[number + 1]:
            number += 1
            # A blank that no token holds may be one whose token is told without it.
            if start < edges[number] or reach < edges[number]:
                behind = encoded(texts[number:], tokenizer, tokenizer.decode(end_of(tokenizer)))
                return [*encoded(texts[:number], tokenizer, lead), *behind]
        pieces[number].append(token)
        reach = max(reach, stop)
    return pieces


def end_of_turn(tokenizer: Any) -> int:
    """The token with which the assistant ends a turn."""
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    return tokens_of(pair, tokenizer, "last", 8)[2][-1]


def shorter(messages: Sequence[Message]) -> list[list[Message]]:
    """A talk whole, without its oldest question and what was answered to it, without the two oldest, ..., and with the
    last question alone; each with its system text."""
    lead = 1 if messages[0]["role"] == "system" else 0
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    return [list(messages), *([*messages[:lead], *messages[user:]] for user in users[1:])]
