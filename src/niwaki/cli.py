"""The commands around runs and artifacts. Heavy imports wait in them, so that `niwaki --help` is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.errors import ConfigError, UserError

app = typer.Typer(
    help="Commands around runs and the artifacts that they leave. Training itself: python train.py --help",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Place = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact, or the folder of a run.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME=THEIRS", help="The file's name for a column: text=sentence."),
]
Format = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="What the file is, where its ending does not tell: squad, chat, ..."),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME|none",
        help="Another adapter on the same base: of a run with tuning.merge=false, of PEFT, or one that was added; "
        "none: the base alone.",
    ),
]


def main() -> None:
    """Run a command; a user's mistake is one line on stderr, exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def evaluate(
    place: Place,
    file: Annotated[Path, typer.Argument(help="Labelled rows: csv, tsv, jsonl, json, parquet, conll or txt.")],
    column: Columns = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    report: Annotated[bool, typer.Option("--report", help="Print a table per class instead.")] = False,
    kind: Format = None,
    adapter: Adapter = None,
) -> None:
    """Score an artifact on a file; JSON out."""
    saved = load(place, adapter)
    from niwaki.inference import WholeFile, scores

    source = WholeFile(train=str(file), format=kind, columns=pairs(column), eval_batch_size=batch_size)
    metrics, tables = scores(saved, source)
    told = {name: table for name, table in tables.items() if name == "signatures"}
    print(class_table(tables, saved.task.name) if report else json.dumps({**finite(metrics), **told}, indent=1))


@app.command()
def predict(
    place: Place,
    text: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts, or JSON objects with the columns of the task; without any and without --file, stdin by lines."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A text a line (txt), or any format with the columns of the task.")
    ] = None,
    column: Columns = None,
    batch_size: Annotated[int, typer.Option(min=1, max=32, help="Texts that are read before they are answered.")] = 32,
    kind: Format = None,
    adapter: Adapter = None,
) -> None:
    """Let an artifact answer texts, or rows by their columns; JSON lines out."""
    if text and file:
        raise ConfigError("predict: give texts or --file, not both")
    if column and not file:
        raise ConfigError(f"--column {column[0]}: names a column of --file; give one")
    if kind and not file:
        raise ConfigError(f"--format {kind}: says what --file is; give one")
    columns = pairs(column)
    saved = load(place, adapter)
    from niwaki.inference import answers

    for answer in answers(saved, rows_of(text, file, kind, columns, saved), batch_size):
        print(json.dumps(answer, ensure_ascii=False), flush=True)


@app.command("list")
def list_options(
    axis: Annotated[str | None, typer.Argument(help="Only this axis, such as tuning.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page of tables.")] = False,
) -> None:
    """Every option, with its paper; *: the default."""
    from niwaki import catalogue

    found = catalogue.options(axis)
    print(catalogue.as_markdown(found) if markdown else catalogue.as_lines(found))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Runs, or folders with runs below.")],
    rows: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Settings that make a row; else each axis with several values, and what else tells runs apart.",
        ),
    ] = "",
    metrics: Annotated[str, typer.Option(metavar="A,B", help="Columns, such as after.test.accuracy.")] = "",
    baseline: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE,...", help="The row that others are compared to.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for report.md, report.csv and report.png.")] = None,
    x: Annotated[str | None, typer.Option(help="Cost across in the picture, such as after.latency_ms.")] = None,
    y: Annotated[str | None, typer.Option(help="Score up in the picture.")] = None,
) -> None:
    """Gather runs into one table."""
    if output is None and (x or y):
        raise ConfigError(f"--{'x' if x else 'y'}: belongs to the picture; give --output")
    from niwaki.measure.gather import report_command

    report_command(folders, split(rows), split(metrics), baseline, output, x, y)


@app.command()
def verify(place: Place) -> None:
    """Check an artifact and show what it holds."""
    saved = load(place)
    from niwaki.inference import facts

    for name, value in facts(saved).items():
        print(f"{name:<11} {value}")


@app.command()
def unpack(
    place: Place,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
) -> None:
    """Write an artifact as dense weights that from_pretrained reads; inputs are no longer rounded."""
    quiet()
    from niwaki import plain
    from niwaki.inference import find_artifact

    print(plain.unpack(find_artifact(place), folder))


@app.command()
def export(
    place: Place,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="onnx and others: niwaki list export.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    file: Annotated[
        Path | None, typer.Argument(help="Labelled rows; without a file, the test rows of the run.")
    ] = None,
    column: Columns = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="SETTING=VALUE", help="Of the format: opset=25.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Timed rounds; 0: none.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Write an artifact in another format, held to the artifact and scored as exported; JSON out."""
    quiet()
    from niwaki.export.command import export_command
    from niwaki.measure.sides import clean

    found = export_command(place, file, pairs(column), to, setting or [], output, repeats, batch_size)
    print(json.dumps(clean(found), indent=1))


@app.command()
def speed(
    place: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Time every form of a run's model in turns: dense, artifact, compiled, each export; a table out."""
    quiet()
    from niwaki.measure.speed_table import speed_command, speed_text

    found = speed_command(place, repeats)
    print(json.dumps(found, indent=1) if as_json else speed_text(found))


@app.command()
def sensitivity(
    place: Place,
    file: Annotated[
        Path | None, typer.Argument(help="Labelled rows; without a file, the validation rows of the run.")
    ] = None,
    column: Columns = None,
    unit: Annotated[str, typer.Option(metavar="linear|block|part", help="What is pruned one at a time.")] = "linear",
    sparsities: Annotated[str, typer.Option(metavar="A,B", help="Each between 0 and 1.")] = "0.5,0.7,0.9",
    target: Annotated[
        float | None, typer.Option(help="Also write sparsities for each linear that make this one over all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows at most.")] = 512,
    output: Annotated[Path | None, typer.Option(help="Folder; else sensitivity/ beside the artifact.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Measure how much each linear, block or part minds being pruned."""
    quiet()
    from niwaki.measure.sensitivity import Plan
    from niwaki.measure.sensitivity_report import sensitivity_command

    plan = Plan(unit=unit, sparsities=tuple(map(fraction, split(sparsities))), target=target)  # type: ignore[arg-type]
    try:
        print(sensitivity_command(place, file, pairs(column), plan, limit, output, batch_size))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


@app.command()
def augment(
    file: Annotated[Path, typer.Option(help="Rows with text (and text_pair) or tokens; labels are not read.")],
    model: Annotated[str, typer.Option(metavar="NAME|FOLDER", help="A masked language model.")],
    output: Annotated[Path, typer.Option("--output", "--out", help="A new .jsonl file.")],
    column: Columns = None,
    copies: Annotated[int, typer.Option(help="Of each row.")] = 20,
    share: Annotated[float, typer.Option(help="Of the words that a copy replaces, by chance.")] = 0.4,
    candidates: Annotated[int, typer.Option(help="Words that one is drawn from.")] = 15,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Masks at once.")] = 32,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto: a GPU where there is one.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write copies of rows with some words replaced (TinyBERT), to learn from a teacher: data.unlabelled."""
    quiet()
    from niwaki.data.augment import Augmentation, augment_command

    settings = Augmentation(copies=copies, share=share, candidates=candidates, seed=seed)
    try:
        count = augment_command(file, pairs(column), model, output, settings, batch_size, device, overwrite=overwrite)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    print(f"{output}: {count:,} rows")


@app.command("add-adapter")
def add_adapter(
    place: Place,
    adapter: Annotated[str, typer.Argument(metavar="FOLDER", help="A run with tuning.merge=false, or PEFT's folder.")],
    name: Annotated[str, typer.Argument(help="What --adapter will call it.")],
) -> None:
    """Copy another adapter into an artifact, under a name."""
    quiet()
    from niwaki.adapters import add
    from niwaki.inference import find_artifact

    print(add(find_artifact(place), adapter, name))


def load(place: Path, adapter: str | None = None) -> Any:
    """The artifact at `place`, verified; with another adapter than its own where one is chosen."""
    quiet()
    from niwaki import adapters, artifact
    from niwaki.inference import find_artifact

    folder = find_artifact(place)
    return artifact.load(folder) if adapter is None else adapters.load_with(folder, adapter)


def quiet() -> None:
    """Keep what libraries say out of the output; before they are imported."""
    from niwaki.quiet import quiet_libraries, quiet_progress

    quiet_libraries()
    quiet_progress()


def rows_of(
    text: list[str] | None, file: Path | None, kind: str | None, columns: dict[str, str], saved: Any
) -> Iterator[dict[str, Any]]:
    """The rows that a user gave, one way or another."""
    from niwaki.inference import file_rows, text_rows

    needs = saved.task.needs
    if file is not None:
        return file_rows(file, columns, needs, kind)
    return text_rows(text, "argument", needs.asking) if text else text_rows(sys.stdin, "stdin line", needs.asking)


def pairs(given: list[str] | None) -> dict[str, str]:
    """`["text=sentence"]` as a mapping."""
    wrong = [one for one in given or [] if not all(one.partition("="))]
    if wrong:
        raise ConfigError(f"--column {wrong[0]}: needs NAME=THEIRS, such as text=sentence")
    return {name: theirs for name, _, theirs in (one.partition("=") for one in given or [])}


def split(names: str) -> list[str]:
    """`a,b` as a list."""
    return [name.strip() for name in names.split(",") if name.strip()]


def fraction(text: str) -> float:
    """A number of --sparsities."""
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--sparsities {text}: needs numbers above 0 and below 1") from error


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Metrics with null for what is not a finite number: JSON has no NaN."""
    from math import isfinite

    return {name: value if isfinite(value) else None for name, value in metrics.items()}


def class_table(tables: dict[str, Any], task: str) -> str:
    """Precision, recall, F1 and support of each class, and their averages, in markdown."""
    from niwaki.measure.report import classes

    if "per_class" not in tables:
        raise ConfigError(f"--report: {task} has no table per class; leave it out")
    return classes(tables)
