"""Columns of tokens and tags, as the shared tasks of CoNLL have them."""

import re
from collections.abc import Collection
from pathlib import Path

from niwaki.data.readers.rows import Rows, rows_from, text_of
from niwaki.errors import DataError

BEGIN, INSIDE, LAST = "BSU", "IMEL", "ESLU"  # what a tag begins with, in IOB, BIOES, BILOU and BMES
MARKED = re.compile(r"([A-Za-z])-(.*)", re.DOTALL)


def read_conll(path: Path, origin: str, wanted: Collection[str]) -> Rows:
    """CoNLL columns: 2 to 4, token first, tag last, split by blanks; an empty line ends a sentence.

    Lines that start with -DOCSTART- are skipped. Tags of entities become IOB2 (`iob2`); any others, such as parts of
    speech, stay.
    """
    tokens: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    lines: list[int] = []
    width = 0
    for line, text in enumerate(text_of(path, origin).split("\n"), start=1):
        fields = re.split(r"[ \t]+", text.strip(" \t\r"))
        if fields == [""] or fields[0] == "-DOCSTART-":
            if tokens[-1]:
                tokens.append([])
                tags.append([])
            continue
        width = width or len(fields)
        if len(fields) != width or not 2 <= width <= 4:
            expected = width if 2 <= width <= 4 else "2 to 4"
            raise DataError(f"{origin} line {line}: {len(fields)} columns, must be {expected}")
        if not tokens[-1]:
            lines.append(line)
        tokens[-1].append(fields[0])
        tags[-1].append(checked_tag(fields[-1], f"{origin} line {line}"))
    columns = {"tokens": tokens[: len(lines)], "tags": [iob2(sentence) for sentence in tags[: len(lines)]]}
    return rows_from(columns, lines, origin, wanted)


def checked_tag(tag: str, place: str) -> str:
    """`tag`, which must not look like that of an entity and be none."""
    if wrong := wrong_tag(tag):
        raise DataError(f"{place}: tag {tag!r} {wrong}")
    return tag


def wrong_tag(tag: str) -> str | None:
    """What is wrong with a tag that looks like that of an entity and is none."""
    marked = MARKED.fullmatch(tag)
    if not marked or (marked[1] in BEGIN + INSIDE and marked[2]):
        return None
    return (
        f"begins with {marked[1]}-, must be O, or one of B-, I- (IOB), E-, S- (BIOES), L-, U- (BILOU) and M- (BMES) "
        "before the type of an entity"
    )


def iob2(tags: list[str]) -> list[str]:
    """The tags of a sentence with every entity begun by B- and gone on with by I- (IOB2: Ratnaparkhi 1998).

    IOB1 (Ramshaw & Marcus 1995) begins most entities with I-; BIOES, BILOU and BMES also mark their last words and
    entities of one word.
    """
    fixed = []
    unfinished = ""  # the type of an entity that the next word may belong to
    for tag in tags:
        marked = MARKED.fullmatch(tag)
        if not marked:
            fixed.append(tag)
            unfinished = ""
            continue
        begins = marked[1] in BEGIN or marked[2] != unfinished
        fixed.append(f"{'B' if begins else 'I'}-{marked[2]}")
        unfinished = "" if marked[1] in LAST else marked[2]
    return fixed
