"""Docstrings: found, made plain, tagged."""

from pathlib import Path

import pytest

from niwaki.data.builtin.docstrings import (
    Docstring,
    docstrings_of,
    folded,
    tag_words,
    without_examples,
    without_names,
)

SOURCE = '''
"""The module."""
class Shelf:
    """A shelf."""
    def put(self, name, *items, x=1, **options):
        """Put items."""
        def inner(key):
            """Inner."""
if True:
    async def fetch(url, /, *, retries): "Fetch it."
try:
    pass
except OSError:
    class Spare:
        def take(self): "Take it."
'''


def test_all_docstrings_are_found_with_group_and_parameters(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    found = {docstring.text: docstring for docstring in docstrings_of(tmp_path / "a.py", "pack.a")}
    assert {text: docstring.group for text, docstring in found.items()} == {
        "The module.": "pack.a",
        "A shelf.": "pack.a.Shelf",
        "Put items.": "pack.a.Shelf",
        "Inner.": "pack.a.Shelf",
        "Fetch it.": "pack.a.fetch",
        "Take it.": "pack.a.Spare",
    }
    assert found["A shelf."].parameters is None
    assert found["Put items."].parameters == {"name", "items", "options"}
    assert found["Put items."].starred == {"items", "options"}
    assert found["Fetch it."].parameters == {"url", "retries"}


def test_a_source_that_does_not_parse_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""Old."""\nprint "x"\n')
    assert list(docstrings_of(tmp_path / "a.py", "a")) == []


def test_examples_and_rules_are_dropped() -> None:
    text = "First.\n\n    >>> f(1)\n    ... + 2\n    3\n\n    -----\n    Last   words.\n"
    assert without_examples(text) == "First. Last words."


@pytest.mark.parametrize(
    ("text", "module", "left"),
    [
        ("The zipfile module reads ZIP archives", "zipfile", "The module reads archives"),
        ("Open a `zipfile.ZipFile` object.", "zipfile", "Open a `` object."),
        ("Call xml.dom.minidom.parse() on XML, please.", "xml.dom.minidom", "Call dom.parse() on, please."),
        ('A "queue", and queues.', "queue", "A, and."),
        ("An IMAP4 client by imaplib", "imaplib", "An IMAP4 client by"),
        ("Old decimals are Decimal numbers", "_pydecimal", "Old are numbers"),
        ("A timer keeps the time", "time", "A timer keeps the"),
    ],
)
def test_the_modules_own_names_are_taken_out(text: str, module: str, left: str) -> None:
    assert without_names(text, module) == left


def test_near_duplicates_fold_to_one() -> None:
    assert folded("Return  the *Name*.") == folded("return the name")
    assert folded("Return the name") != folded("Return the names")


def tagged(text: str, parameters: set[str] | None, starred: set[str] = frozenset()) -> list[tuple[str, str]]:
    docstring = Docstring(
        module="m",
        group="m.f",
        text=text,
        parameters=None if parameters is None else frozenset(parameters),
        starred=frozenset(starred),
    )
    tokens, tags = tag_words(text, docstring)
    return [(token, tag) for token, tag in zip(tokens, tags, strict=True) if tag != "O"]


def test_words_are_tagged_by_what_they_name() -> None:
    assert tagged("If key is None, raise KeyError; keys are int (Key)", {"key"}) == [
        ("key", "B-PARAMETER"),
        ("None", "B-CONSTANT"),
        ("KeyError", "B-EXCEPTION"),
        ("int", "B-TYPE"),
    ]


def test_a_parameter_wins_over_a_type() -> None:
    assert tagged("the bytes", {"bytes"}) == [("bytes", "B-PARAMETER")]


def test_stars_belong_to_starred_parameters_only() -> None:
    assert tagged("pass *args and **kwargs to *func*", {"args", "kwargs", "func"}, {"args", "kwargs"}) == [
        ("*", "B-PARAMETER"),
        ("args", "I-PARAMETER"),
        ("**", "B-PARAMETER"),
        ("kwargs", "I-PARAMETER"),
        ("func", "B-PARAMETER"),
    ]
    assert tagged("with *args* as is", {"args"}, {"args"}) == [("args", "B-PARAMETER")]


def test_what_is_no_function_has_no_tags() -> None:
    tokens, tags = tag_words("Some None.", Docstring(module="m", group="m", text="", parameters=None))
    assert (tokens, tags) == (["Some", "None", "."], [])
