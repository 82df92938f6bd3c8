"""Text that every Python carries: the docstrings of its standard library, parsed and never imported."""

import hashlib
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from niwaki.data.builtin.docstrings import (
    Docstring,
    docstrings_of,
    folded,
    tag_words,
    without_examples,
    without_names,
)
from niwaki.data.encode import cache_folder
from niwaki.data.source import SPLITS, Needs, Source
from niwaki.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from datasets import Dataset

LONGEST_TEXT = 64  # words
SHORTEST_TEXT = 5  # words

AREAS: dict[str, str] = {
    "interfaces": "tkinter turtle curses cmd argparse optparse getopt getpass colorsys tty pty rlcompleter",
    "networking": """http urllib ftplib telnetlib socket socketserver ssl wsgiref xmlrpc cgi cgitb webbrowser
        ipaddress asynchat asyncore netrc nturl2path hmac secrets uuid crypt hashlib
        email mailbox mailcap mimetypes imaplib poplib smtplib smtpd nntplib quopri uu""",
    "concurrency": """asyncio multiprocessing threading _threading_local concurrent queue sched selectors
        signal subprocess contextvars""",
    "data formats": """xml json csv configparser plistlib tomllib html _markupbase pickle pickletools copyreg
        base64 xdrlib wave aifc sunau sndhdr imghdr chunk sqlite3 dbm shelve""",
    "text": """encodings codecs re sre_compile sre_parse difflib textwrap string locale gettext shlex pprint
        stringprep reprlib fnmatch _strptime calendar""",
    "numbers": "_pydecimal decimal fractions statistics numbers random datetime _pydatetime zoneinfo",
    "files": """os pathlib shutil tempfile glob posixpath ntpath genericpath tarfile zipfile gzip bz2 lzma
        zipapp _pyio io fileinput filecmp stat linecache _compression platform pipes""",
    "packaging": """importlib distutils pkgutil zipimport venv site sysconfig runpy imp ensurepip modulefinder
        compileall py_compile _osx_support _aix_support _sitebuiltins""",
    "debugging": """unittest doctest pdb bdb inspect pydoc trace traceback dis ast symtable warnings logging
        profile cProfile pstats timeit tracemalloc code codeop pyclbr tokenize tabnanny opcode""",
    "structures": """collections _collections_abc typing enum dataclasses functools operator contextlib
        weakref _weakrefset copy heapq bisect abc _py_abc types graphlib ctypes keyword""",
}


T = TypeVar("T", bound="DataclassInstance")


class Grouped(Protocol):
    """A row with a label, and with the name of what belongs in one split."""

    @property
    def group(self) -> str: ...

    @property
    def label(self) -> str: ...


G = TypeVar("G", bound=Grouped)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One docstring; `group` is its module and top-level class or function. Only functions have `tags`."""

    group: str
    label: str
    text: str
    tokens: list[str]
    tags: list[str]


@dataclass(frozen=True, kw_only=True)
class PythonDocs(Source):
    """Docstrings of the running interpreter's standard library; their number differs a little by version.

    `text` and `label`: the first words of a docstring, and the area of its module; the names of the module
    and of its package are taken out of the text. `tokens` and `tags` (docstrings of functions): words tagged
    in IOB2 as PARAMETER (of the documented function), EXCEPTION, TYPE or CONSTANT; at most half of these rows
    have no entity. Whole classes and functions are dealt to the splits in the order of a hash, area by area,
    in the shares of `validation_fraction` and `test_fraction`: the splits are the same for every seed.
    """

    def read(self, needs: Needs) -> "dict[str, Dataset]":
        from datasets import Dataset

        tagged = "tags" in needs.required
        columns = ("tokens", "tags") if tagged else ("text", "label")
        rows = {
            split: _tagged(part) if tagged else part
            for split, part in deal(cached_rows(), self.validation_fraction, self.test_fraction).items()
        }
        return {
            split: Dataset.from_dict({name: [getattr(row, name) for row in part] for name in columns})
            for split, part in rows.items()
        }


def deal(rows: list[G], validation_fraction: float, test_fraction: float) -> dict[str, list[G]]:
    """The rows by split: of each area whole groups, in the order of their hash, until a split has its share.

    A group larger than the room left in a split is passed over; what no other split takes is for training.
    """
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        groups[row.label][row.group] += 1
    split_of: dict[str, str] = {}
    for sizes in groups.values():
        for split, fraction in (("test", test_fraction), ("validation", validation_fraction)):
            room = round(fraction * sum(sizes.values()))
            for group in sorted(sizes.keys() - split_of.keys(), key=_hash):
                if sizes[group] <= room:
                    split_of[group] = split
                    room -= sizes[group]
    return {split: [row for row in rows if split_of.get(row.group, "train") == split] for split in SPLITS}


def _tagged(rows: list[Row]) -> list[Row]:
    """The rows of functions; of those without an entity as many as there are with one, chosen by a hash."""
    functions = [row for row in rows if row.tags]
    empty = [row for row in functions if set(row.tags) == {"O"}]
    allowed = len(functions) - len(empty)
    dropped = {row.text for row in sorted(empty, key=lambda row: _hash(row.text))[allowed:]}
    return [row for row in functions if row.text not in dropped or set(row.tags) != {"O"}]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def cached_rows() -> list[Row]:
    """`parse_rows` of the running interpreter."""
    return cached("python_docs", Row, parse_rows)


def cached(name: str, kind: type[T], parse: Callable[[Path], list[T]]) -> list[T]:
    """What `parse` makes of the running standard library, rows of a dataclass, kept in the cache folder until Python
    or the code (docstrings.py, python_docs.py and the file of that name) changes."""
    library = Path(os.__file__).parent
    files = sorted({"docstrings.py", "python_docs.py", f"{name}.py"})
    code = b"".join(Path(__file__).with_name(file).read_bytes() for file in files)
    key = hashlib.sha256(f"{sys.version}\n{library}\n".encode() + code).hexdigest()
    path = cache_folder() / name / f"{key}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [kind(**values) for values in kept]
    except (OSError, ValueError, TypeError):
        rows = parse(library)
    _save(rows, path)
    return rows


def _save(rows: Sequence["DataclassInstance"], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump([asdict(row) for row in rows], stream)
        os.replace(name, path)
    except OSError as error:
        raise DataError(f"cache folder {path.parent}: cannot be used: {error}; set NIWAKI_CACHE to another") from error


def parse_rows(library: Path) -> list[Row]:
    """The rows of a standard library at `library`; each text once. DataError where an area has no source."""
    texts: dict[str, list[Row]] = defaultdict(list)
    for area, module, path in modules(library):
        for docstring in docstrings_of(path, module):
            row = _row(area, docstring)
            if row is not None:
                texts[folded(row.text)].append(row)
    rows = [same[0] for same in texts.values() if len({row.label for row in same}) == 1]
    missing = sorted(AREAS.keys() - {row.label for row in rows})
    if missing:
        raise DataError(f"{library}: no docstrings on {', '.join(missing)}; is Python here without its sources?")
    return rows


def modules(library: Path) -> Iterator[tuple[str, str, Path]]:
    """Area, dotted name and path of each source file, in one order on every machine."""
    for area, names in AREAS.items():
        for name in sorted(names.split()):
            if (library / f"{name}.py").is_file():
                yield area, name, library / f"{name}.py"
            for path in sorted((library / name).rglob("*.py")):
                parts = path.relative_to(library).with_suffix("").parts
                if not {"test", "tests", "_bundled", "__pycache__"} & set(parts):
                    yield area, ".".join(part for part in parts if part != "__init__"), path


def _row(area: str, docstring: Docstring) -> Row | None:
    plain = without_examples(docstring.text)
    words = without_names(plain, docstring.module).split()
    if len(words) < SHORTEST_TEXT:
        return None
    tokens, tags = tag_words(" ".join(plain.split()[:LONGEST_TEXT]), docstring)
    text = " ".join(words[:LONGEST_TEXT])
    return Row(group=docstring.group, label=area, text=text, tokens=tokens, tags=tags)
