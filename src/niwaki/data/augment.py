"""Data augmentation of TinyBERT (Jiao et al. 2020, arXiv:1909.10351, Algorithm 1): copies of rows with some words put
in place of others by a masked language model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from niwaki.data.files import Files
from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError, UserError
from niwaki.model import proposals
from niwaki.model.proposals import Proposer, Span, is_word
from niwaki.task.ner import WORD

Row = dict[str, str | list[str]]
COLUMNS = ("text", "text_pair", "tokens")
ROWS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Each of `copies` (the paper's N_a) replaces each word of a row with probability `share` (p_t) by one of its
    `candidates` (K), drawn evenly: the words that a masked language model finds likeliest there.

    Where this is not the paper's: a word of several pieces has the candidates of one mask in place of all of it, for
    which the paper takes neighbours among GloVe vectors; all candidates are of the row as it was, with one mask at a
    time, so that they are computed once for all copies, as in the authors' code; and no word is its own candidate.
    """

    copies: int = 20
    share: float = 0.4
    candidates: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("copies", "candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: needs a whole number of at least 1")
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share {self.share}: needs a number above 0, up to 1")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: needs a whole number of at least 0")

    def augment(self, rows: Sequence[Row], proposer: Proposer, batch_size: int) -> Iterator[Row]:
        """The copies of all rows, in their order; none that equals a row or another copy. The draws of a row depend on
        the seed and on its number alone."""
        seen = {identity(row) for row in rows}
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = [
                {name: Words.of(value) for name, value in row.items()} for row in rows[start : start + ROWS_AT_ONCE]
            ]
            texts = [(words.text, words.spans) for row in part for words in row.values()]
            proposed = iter(proposer.propose(texts, self.candidates, batch_size))
            for number, row in enumerate(part, start=start):
                options = [next(proposed) for _ in row]
                for copy in self.copies_of(row, options, np.random.default_rng([self.seed, number])):
                    if identity(copy) not in seen:
                        seen.add(identity(copy))
                        yield copy

    def copies_of(
        self, row: Mapping[str, Words], options: Sequence[list[list[str]]], generator: np.random.Generator
    ) -> Iterator[Row]:
        """Copies of a row; `options` are the candidates of each word of each column."""
        for _ in range(self.copies):
            drawn = [[self.draw(words, generator) for words in column] for column in options]
            yield {name: row[name].replaced(words) for name, words in zip(row, drawn, strict=True)}

    def draw(self, candidates: Sequence[str], generator: np.random.Generator) -> str | None:
        """One of the candidates, or None: the word stays."""
        if not candidates or generator.random() >= self.share:
            return None
        return candidates[int(generator.integers(len(candidates)))]


@dataclass(frozen=True)
class Words:
    """A column of a row in parts, some of which are words: a text, or a list of words as it is."""

    parts: tuple[str, ...]
    listed: bool

    @classmethod
    def of(cls, value: str | list[str]) -> Words:
        """Words of a text are what task=ner takes for words."""
        if isinstance(value, list):
            return cls(tuple(value), listed=True)
        parts, end = [], 0
        for match in WORD.finditer(value):
            parts += [value[end : match.start()], match.group()]
            end = match.end()
        return cls((*parts, value[end:]), listed=False)

    @property
    def text(self) -> str:
        """What the model reads."""
        return (" " if self.listed else "").join(self.parts)

    @property
    def places(self) -> list[int]:
        """Which parts are words: those with a letter or digit."""
        return [place for place, part in enumerate(self.parts) if is_word(part)]

    @property
    def spans(self) -> list[Span]:
        """Where each word stands in the text."""
        starts = np.cumsum([0, *(len(part) + self.listed for part in self.parts)]).tolist()
        return [(starts[place], starts[place] + len(self.parts[place])) for place in self.places]

    def replaced(self, words: Sequence[str | None]) -> str | list[str]:
        """The column with these words in place of its own, but for those that are None."""
        parts = list(self.parts)
        for place, word in zip(self.places, words, strict=True):
            parts[place] = parts[place] if word is None else word
        return parts if self.listed else "".join(parts)


def identity(row: Row) -> int:
    """A number that differs where rows do; the rows themselves would take much memory."""
    return hash(json.dumps(list(row.values())))


def read_rows(file: Path, columns: Mapping[str, str]) -> list[Row]:
    """The texts of a file: its columns text and text_pair, or tokens.

    Raises:
        UserError: no file, no such column, or a bad value; names the file and the line.
    """
    wrong = [name for name in columns if name not in COLUMNS]
    if wrong:
        raise ConfigError(f"--column {wrong[0]}={columns[wrong[0]]}: needs one of {', '.join(COLUMNS)}")
    try:
        source = Files(train=str(file), unlabelled=str(file), columns=columns)
        values = source.read_unlabelled(Needs(required=(), optional=COLUMNS))
    except UserError as error:
        message = (
            str(error).replace("data.unlabelled=", "--file ").replace("name it with data.columns.", "use --column ")
        )
        raise type(error)(message) from error
    if ("text" in values) == ("tokens" in values) or {"text_pair", "tokens"} <= set(values):
        raise DataError(
            f"--file {file}: has {' and '.join(values) or 'neither text nor tokens'}; needs a column text, and perhaps "
            "text_pair, or a column tokens; name another with --column text=..."
        )
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A stream whose text becomes the file at `path` when all went well, and is gone otherwise.

    Raises:
        ConfigError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            yield stream
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)


def augment_command(
    file: Path, columns: Mapping[str, str], model: str, output: Path, settings: Augmentation, batch_size: int,
    device: str, *, overwrite: bool,
) -> int:  # fmt: skip
    """Write the copies of the rows of a file, without labels, under the names that their columns have there; how many.

    Raises:
        UserError: what was asked for cannot be; nothing was written then.
    """
    if output.suffix != ".jsonl":
        raise ConfigError(f"--output {output}: needs a name that ends in .jsonl")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output}: exists already; choose another name, or add --overwrite")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    rows = read_rows(file, columns)
    if output.exists() and output.samefile(file):
        raise ConfigError(f"--output {output}: is the file that is read; choose another name")
    proposer, count = proposals.load(model, proposals.chosen_device(device)), 0
    with whole_file(output) as stream:
        for count, row in enumerate(settings.augment(rows, proposer, batch_size), start=1):  # noqa: B007
            named = {columns.get(name, name): value for name, value in row.items()}
            print(json.dumps(named, ensure_ascii=False), file=stream)
        if not count:
            raise DataError(f"--file {file}: none of its words could be replaced")
    return count
