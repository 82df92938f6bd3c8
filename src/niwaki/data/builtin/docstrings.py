"""Docstrings found by parsing a source file, made plain, and their words tagged."""

import ast
import builtins
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

CONSTANTS = frozenset({"None", "True", "False"})
# Not object, set, type, range, slice, complex: in prose these are mostly plain words.
TYPES = frozenset(
    {"int", "str", "dict", "float", "bool", "bytes", "bytearray", "tuple", "list", "frozenset", "memoryview"}
)
EXCEPTIONS = frozenset(
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
)


@dataclass(frozen=True, kw_only=True)
class Docstring:
    """One docstring of a module, class or function.

    `group` is the module with its top-level class or function. `parameters` is None where no function is
    meant; `starred` are those of them that the signature writes with stars.
    """

    module: str
    group: str
    text: str
    parameters: frozenset[str] | None
    starred: frozenset[str] = frozenset()


def docstrings_of(path: Path, module: str) -> Iterator[Docstring]:
    """All docstrings of a source file, outermost first; nothing where it is not Python of this version."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return
    if text := ast.get_docstring(tree):
        yield Docstring(module=module, group=module, text=text, parameters=None)
    for statement in tree.body:
        for outermost, node in _definitions(statement, None):
            if text := ast.get_docstring(node):
                yield _docstring(node, module, f"{module}.{outermost}", text)


def _definitions(statement: ast.AST, outermost: str | None) -> Iterator[tuple[str, Definition]]:
    """Classes and functions in a statement, each with the name of the outermost one that holds it."""
    if isinstance(statement, Definition):
        outermost = outermost or statement.name
        yield outermost, statement
    # Not ast.walk: it would visit every expression, ten times the work.
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for inner in getattr(statement, block, ()):
            yield from _definitions(inner, outermost)


def _docstring(node: Definition, module: str, group: str, text: str) -> Docstring:
    if isinstance(node, ast.ClassDef):
        return Docstring(module=module, group=group, text=text, parameters=None)
    arguments = node.args
    starred = {argument.arg for argument in (arguments.vararg, arguments.kwarg) if argument}
    named = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)} - {
        "self",
        "cls",
    }
    long = frozenset(name for name in named | starred if len(name) > 1)
    return Docstring(module=module, group=group, text=text, parameters=long, starred=frozenset(starred) & long)


def without_examples(text: str) -> str:
    """The docstring without doctest blocks (from >>> to the next blank line) and ruled lines, on one line."""
    kept, inside = [], False
    for line in inspect.cleandoc(text).splitlines():
        inside = line.lstrip().startswith((">>>", "...")) or (inside and bool(line.strip()))
        if not inside and not re.fullmatch(r"\W*", line):
            kept.append(line)
    return " ".join(" ".join(kept).split())


def without_names(text: str, module: str) -> str:
    """The text without the names of the module and of its top-level package, or what these plainly come from.

    Of `zipfile` the words zipfile, zipfiles and zip go; of `xml.dom.minidom` xml and minidom.
    """
    parts = module.split(".")
    names = set()
    for part in (parts[0], parts[-1]):
        plain = re.sub(r"^_(py)?|\d+$", "", part)
        names |= {part, plain, plain.removesuffix("s"), plain + "s", plain.replace("_", " ")}
        names |= {plain.removesuffix(ending) for ending in ("lib", "file", "parser", "server")}
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if len(name) > 1)
    # With the quotes around it, and with the dot that joins it to the name of a member.
    name = rf"(?P<quote>['\"`]{{0,2}})(?<![^\W_])(?:{alternatives})(?![^\W_])(?P=quote)(?:\.(?=\w))?"
    bare = re.sub(name, "", text, flags=re.IGNORECASE)
    return " ".join(re.sub(r"\s+([.,;:)])(?=\s|$)", r"\1", bare).split())


def folded(text: str) -> str:
    """The text's letters and digits in lower case: equal for near duplicates."""
    return "".join(re.findall(r"[^\W_]", text.casefold()))


def tag_words(text: str, docstring: Docstring) -> tuple[list[str], list[str]]:
    """Words and punctuation, and their IOB2 tags; no tags where the docstring is not a function's."""
    tokens = re.findall(r"\*\*|\w+|[^\w\s]", text)
    if docstring.parameters is None:
        return tokens, []
    tags = [_tag(token, docstring.parameters) for token in tokens]
    for index, (star, name) in enumerate(itertools.pairwise(tokens)):
        # *args is one entity of two words, but the closing star of *emphasis* begins none.
        opens = index == 0 or tokens[index - 1] != star
        if star in ("*", "**") and name in docstring.starred and opens and tokens[index + 2 : index + 3] != [star]:
            tags[index : index + 2] = ["B-PARAMETER", "I-PARAMETER"]
    return tokens, tags


def _tag(token: str, parameters: frozenset[str]) -> str:
    kinds = {"PARAMETER": parameters, "EXCEPTION": EXCEPTIONS, "TYPE": TYPES, "CONSTANT": CONSTANTS}
    return next((f"B-{kind}" for kind, names in kinds.items() if token in names), "O")
