"""What one does with an artifact: evaluate it on a labelled file, let it answer, look at what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from niwaki import artifact
from niwaki.data.columns import NAMES
from niwaki.data.corpus import Corpus
from niwaki.data.files import Files
from niwaki.data.source import SPLITS, Needs
from niwaki.errors import ArtifactError, DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from niwaki.task.task import Task

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class WholeFile(Files):
    """Every row of one file, in its order: nothing is carved off."""

    def _carved(self, found: dict[str, Dataset], seed: int) -> dict[str, Dataset]:
        return dict.fromkeys(SPLITS, found["train"])

    def rows(self, needs: Needs) -> Dataset:
        """The rows under the task's names, each checked.

        Raises:
            DataError: no file, no rows, a missing column or a bad value; names the file and the line.
        """
        try:
            return self.splits(needs, seed=0)["test"]
        except DataError as error:
            message = str(error).replace("data.train=", "").replace("name it with data.columns.", "use --column ")
            raise DataError(message) from error


def find_artifact(place: Path) -> Path:
    """The folder of the artifact: `place`, or its model/ where `place` is the folder of a run.

    Raises:
        ArtifactError: neither holds an artifact.
    """
    for folder in (place, place / "model"):
        if artifact.is_artifact(folder):
            return folder
    raise ArtifactError(f"artifact {place}: needs the folder of a run or its model/, with {artifact.CARD} in it")


def scores(saved: artifact.Artifact, source: WholeFile) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of the artifact on a labelled file, and the tables of the task's report.

    Raises:
        DataError: rows that cannot be used, or a label that the artifact does not know.
    """
    from datasets import Dataset

    from niwaki.measure.evaluate import evaluate

    rows = source.rows(saved.task.needs.trained_on(saved.columns))
    check_labels(rows, saved.labels, str(source.train), saved.task)
    features = Dataset.from_dict(saved.task.encode(rows[:], saved.tokenizer, saved.labels))
    corpus = Corpus(saved.task, source, saved.tokenizer, saved.labels, {"test": features}, seed=0)
    found = evaluate(saved.model, corpus.evaluation("test"), saved.task, saved.labels, saved.tokenizer)
    return {"rows": len(rows), **found.compute()}, found.report()


def check_labels(rows: Dataset, known: tuple[str, ...], origin: str, task: Task) -> None:
    """Refuse labels that the artifact has no output for; a task without labels knows none and needs none."""
    columns = [column for column in ("label", "labels", "tags") if known and column in rows.column_names]
    for column in columns:
        for number, value in enumerate(rows[column][:], start=1):
            read = task.read_as(column, value)
            for label in read if isinstance(read, list) else [read]:
                if label not in known:
                    near = nearest(label, known)
                    raise DataError(
                        f"{origin} row {number}: {column} {label!r} is none of the {len(known)} "
                        f"that the artifact knows; the nearest is {near!r}"
                    )


def answers(saved: artifact.Artifact, rows: Iterable[Row], batch_size: int) -> Iterator[dict[str, Any]]:
    """What the artifact says of each row, in order, as soon as a batch of rows has come.

    Raises:
        DataError: a row lacks a column that the artifact was trained on.
    """
    import torch

    iterator = iter(rows)
    while batch := [like_trained(row, saved) for row in islice(iterator, batch_size)]:
        with torch.inference_mode():
            found = list(saved.task.answers(saved.model, saved.tokenizer, saved.labels, batch))
        yield from found


def like_trained(row: Row, saved: artifact.Artifact) -> Row:
    """The row with those optional columns that the artifact was trained on; all of them where that is not known.

    Raises:
        DataError: it lacks one of them.
    """
    if not saved.columns:
        return row
    needs = saved.task.needs
    for column in needs.asking.optional:
        if column in saved.columns and column not in row and column not in (*NAMES, *needs.hints):
            first, value = next(iter(row.items()))
            raise DataError(
                f"{first} {str(value)[:40]!r}: has no {column}, which the artifact was trained on; give "
                f"{needs.trained_on(saved.columns).asking.example}, or a file with a column {column}, or name it with "
                f"--column {column}=..."
            )
    unread = {column for column in needs.optional if column not in (*saved.columns, *NAMES)}
    return {name: value for name, value in row.items() if name not in unread}


def text_rows(lines: Iterable[str], origin: str, needs: Needs) -> Iterator[Row]:
    """A row for each line, which is a JSON object, or the one text that the task is asked for.

    Raises:
        DataError: an empty line, one that is not UTF-8, or one that does not fill the columns.
    """
    number = 0
    try:
        for number, line in enumerate(lines, start=1):  # noqa: B007  (the handlers read it)
            yield needs.from_text(line.rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin} {number + 1}: not UTF-8; convert it first") from error
    except ValueError as error:
        raise DataError(f"{origin} {number}: {error}") from error


def file_rows(path: Path, columns: Mapping[str, str], needs: Needs, kind: str | None = None) -> Iterator[Row]:
    """The rows of a file: txt by lines, as they are read; any other format by the columns that the task is asked for.
    `kind`: its format, where the ending does not tell.

    Raises:
        DataError: no file, no such column, or a bad value.
        ConfigError: no such format.
    """
    if (kind or path.suffix.lower().lstrip(".")) == "txt":
        with opened(path) as stream:
            yield from text_rows(stream, f"{path} line", needs.asking)
        return
    source = WholeFile(train=str(path), format=kind, columns=columns)
    if source.is_running_text("train"):
        lines = source.rows(Needs(required=("text",)))["text"][:]
        yield from text_rows(lines, f"{path} line", needs.asking)
    else:
        yield from source.rows(needs.asking)


def opened(path: Path) -> TextIO:
    """A text file to read.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def facts(saved: artifact.Artifact) -> dict[str, str]:
    """What an artifact is and holds, for people."""
    from niwaki.measure.report import number
    from niwaki.measure.size import count
    from niwaki.weights import kernels

    counted = count(saved.model)
    size = artifact.weight_bytes(saved.folder)
    return {
        "artifact": f"{saved.folder}: every file has its checksum, the weights fit",
        "task": brief(saved.task.name, asdict(saved.task)),
        "labels": f"{len(saved.labels)}: {', '.join(saved.labels)}" if saved.labels else "none",
        "edits": "; ".join(brief(type(edit).__name__, asdict(edit)) for edit in saved.edits) or "none",
        "bytes": f"{size:,} ({number('bytes', size)})",
        "parameters": f"{counted['parameters']:,}, {counted['nonzero']:,} of them not zero",
        "sparsity": f"{1 - counted['nonzero'] / counted['parameters']:.4f}",
        "products": ", ".join(f"{n} by {name}" for name, n in kernels(saved.model).items()) or "of dense weights",
    }


def brief(name: str, settings: Mapping[str, Any]) -> str:
    """`name (setting value, ...)`, with the length of what is long."""
    shown = [
        f"{len(value)} {key}"
        if isinstance(value, list | tuple | dict) and len(value) > 8
        else f"{key} {shortened(value)}"
        for key, value in settings.items()
    ]
    return f"{name} ({', '.join(shown)})" if shown else name


def shortened(value: Any) -> str:
    """A setting, without the end of a long one."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
