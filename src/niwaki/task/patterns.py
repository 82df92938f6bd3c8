"""Texts in a pattern, words for labels: what a language model is asked (Schick & Schutze 2021, arXiv:2001.07676)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from niwaki.errors import ConfigError
from niwaki.task.descriptions import readable

PARTS = re.compile(r"\{(text|text_pair|mask)\}")


@dataclass(frozen=True)
class Pattern:
    """`{text} This is about {mask}.`, filled with texts. `causal`: it is read from left to right, so it ends where the
    word would follow, and no special token stands behind it. `opens`: it begins with the special tokens of a text."""

    pattern: str
    causal: bool
    max_length: int
    opens: bool = True

    @property
    def asked(self) -> str:
        """The pattern as it is read: for a causal model up to the blanks before {mask}."""
        return self.pattern.partition("{mask}")[0].rstrip() if self.causal else self.pattern

    def filled(self, row: Mapping[str, str], tokenizer: Any) -> str:
        """The pattern with the texts of a row in it. A text that spells the mask does not ask anything."""
        mask = "" if self.causal else tokenizer.mask_token

        def part(found: re.Match[str]) -> str:
            if found[1] == "mask":
                return str(mask)
            return row[found[1]].replace(mask, re.sub(r"\W", "", mask)) if mask else row[found[1]]

        return PARTS.sub(part, self.asked)

    def encoded(self, rows: Sequence[Mapping[str, str]], tokenizer: Any) -> list[list[int]]:
        """The tokens of each row, at most `max_length`: one that is too long loses the ends of its texts, the pattern
        stays.

        Raises:
            ConfigError: the pattern alone is longer.
        """
        found = self._tokens([self.filled(row, tokenizer) for row in rows], tokenizer)
        for number, row in enumerate(rows):
            left = dict(row)
            while (excess := len(found[number]) - self.max_length) > 0:
                longest = max(left, key=lambda name: len(left[name]))
                if not left[longest]:
                    raise ConfigError(
                        f"task.max_length={self.max_length}: task.pattern={self.pattern!r} alone has "
                        f"{len(found[number])} tokens; needs more"
                    )
                left[longest] = shortened(left[longest], excess, tokenizer)
                found[number] = self._tokens([self.filled(left, tokenizer)], tokenizer)[0]
        return found

    def _tokens(self, texts: list[str], tokenizer: Any) -> list[list[int]]:
        if not self.causal:
            return list(tokenizer(texts)["input_ids"])
        from niwaki.task.masked_lm import edges

        before = edges(tokenizer)[0] if self.opens else []
        return [[*before, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def check_pattern(pattern: str) -> None:
    """Raise ConfigError unless a text and the word for it have their place."""
    names = PARTS.findall(pattern)
    twice = sorted({name for name in names if names.count(name) > 1})
    if "text" not in names or "mask" not in names or twice:
        raise ConfigError(
            f"task.pattern={pattern!r}: needs {{text}} once and {{mask}} once, and {{text_pair}} where rows have one"
        )


def check_columns(pattern: str, columns: Sequence[str]) -> None:
    """Raise ConfigError where the pattern reads another text than rows have."""
    reads, given = "{text_pair}" in pattern, "text_pair" in columns
    if reads and not given:
        raise ConfigError(f"task.pattern={pattern!r}: the rows have no text_pair; leave {{text_pair}} out")
    if given and not reads:
        raise ConfigError(
            f"task.pattern={pattern!r}: the rows have a text_pair; give it a place, such as "
            "task.pattern='{text}? {mask}, {text_pair}'"
        )


def shortened(text: str, tokens: int, tokenizer: Any) -> str:
    """A text without its last `tokens`; at least something goes."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    kept = spans[: max(0, len(spans) - tokens)]
    return text[: min(kept[-1][1], len(text) - 1)] if kept else ""


def word_tokens(labels: Sequence[str], verbalizer: Mapping[str, str], tokenizer: Any) -> list[int]:
    """For each label the token of its word: the one of the verbalizer, else its name made readable.

    Raises:
        ConfigError: a word is no single token, or stands for two labels.
    """
    found: dict[int, str] = {}
    for label in labels:
        word = verbalizer.get(label, readable(label))
        token = token_of(word, tokenizer)
        if token is None:
            single = {form: token_of(form, tokenizer) for form in forms_of(word)}
            forms = [form for form, one in single.items() if one is not None and one not in found]
            hint = f"such as task.verbalizer.{label}={forms[0]}" if forms else f"by task.verbalizer={{{label}: ...}}"
            raise ConfigError(
                f"task.verbalizer: {word!r}, for the label {label!r}, is not one token of this model; give a word that "
                f"is, {hint}"
            )
        if token in found:
            raise ConfigError(
                f"task.verbalizer: {word!r} stands for both {found[token]!r} and {label!r}; give each a word of its own"
            )
        found[token] = label
    return list(found)


def token_of(word: str, tokenizer: Any) -> int | None:
    """The one token of a word, as it stands behind a blank if there is such a token; None where it takes several."""
    for text in (f" {word}", word):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    return None


def forms_of(word: str) -> list[str]:
    """Shorter words that could stand for one."""
    parts = sorted(filter(None, re.split(r"\W+", word)), key=len, reverse=True)
    return list(dict.fromkeys(form for part in parts for form in (part, part.lower(), part[:1])))
