"""Many runs in one table: rows by any setting, mean and spread over seeds, change against a named row."""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from niwaki.errors import ArtifactError, ConfigError, nearest
from niwaki.measure.report import flatten, is_score, markdown_table, more_is_better, sparsity, with_spread

IDENTITY = ("task", "data", "model", "tuning", "compression")
COSTS = ("after.bytes", "after.latency_ms", "after.throughput", "train_seconds")
NOT_MEASURED = ("targets", "versions", "schema", "seed")
# settings that only say where or how often, never what was learned
PLACE_GROUPS = ("hydra", "study", "name", "resume", "debug", "logger", "paths", "seed")
PLACE_NAMES = ("seed", "dir", "folder", "output", "root", "cache", "_target_")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run: settings by dotted key, as text; numbers of metrics.json by dotted key."""

    folder: Path
    settings: dict[str, str]
    metrics: dict[str, float | None]
    metric: str
    mode: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric over the runs of a row: `spread` (sample deviation) is None for one run."""

    count: int
    mean: float | None
    spread: float | None
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """A row of the table: its values of the row keys, its runs, a cell a metric."""

    key: tuple[str, ...]
    runs: tuple[Run, ...]
    cells: dict[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Runs grouped by the keys `rows`; `baseline` is the key of the row that changes refer to."""

    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    groups: tuple[Group, ...]
    baseline: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def _search(folder: Path) -> Iterator[Path]:
    """Folders at or below `folder` that hold a run's files, in order; never looks inside a run."""
    for place, below, files in os.walk(folder):
        if "metrics.json" in files or "config.yaml" in files:
            below.clear()
            yield Path(place)
        below[:] = sorted(name for name in below if not name.startswith("."))


def find(folders: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Finished and unfinished run folders at or below `folders`. ConfigError where there is not one run."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"report: no folder {folder}; name a run's folder or one that holds runs")
        below = list(_search(folder))
        if not below:
            raise ConfigError(f"report: no run in {folder}; a run leaves config.yaml and metrics.json")
        found.update((run.resolve(), run) for run in below)
    finished = [run for run in found.values() if (run / "metrics.json").exists()]
    return finished, [run for run in found.values() if run not in finished]


def _reject(constant: str) -> NoReturn:
    raise ValueError(f"holds {constant}, which is no number")


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a run. ArtifactError, naming the file, if it is broken or of another schema."""
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); run it again or move it away") from None
    if not isinstance(metrics, dict) or metrics.get("schema") != 1:
        raise ArtifactError(f"{path}: not metrics of schema 1; run it again or move it away")
    missing = [key for key in (*IDENTITY, "seed", "metric", "mode", "after") if key not in metrics]
    if missing:
        raise ArtifactError(f"{path}: lacks {', '.join(missing)}; run it again or move it away")
    return metrics


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run. ArtifactError, naming the file, if it is missing or broken."""
    import yaml

    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: holds no settings")
    return config


def setting(value: Any) -> str:
    """A setting as it is typed on the command line: `null`, `true`, `[prune/magnitude,quantize/int8]`."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(setting, value)) + "]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def read_run(folder: Path) -> Run:
    """One finished run. ArtifactError if a file of it is broken."""
    metrics, config = read_metrics(folder), read_config(folder)
    settings = {key: value for key, value in flatten(config).items() if value != {}}
    settings.update((key, metrics[key]) for key in (*IDENTITY, "seed"))
    named = {key: value for key, value in metrics.items() if key not in NOT_MEASURED}
    named["after"] = {**metrics["after"], "sparsity": sparsity(metrics["after"])}
    return Run(
        folder=folder,
        settings={key: setting(value) for key, value in settings.items()},
        metrics={key: value for key, value in flatten(named).items() if _is_number(value)},
        metric=metrics["metric"],
        mode=metrics["mode"],
    )


def gather(folders: Iterable[Path]) -> list[Run]:
    """Every finished run at or below `folders`. UserError for a folder without one, or a broken file."""
    return [read_run(folder) for folder in find(folders)[0]]


def _unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    names = sorted(dict.fromkeys(known), key=lambda known: not known.startswith("after."))
    # a short name is mostly the last part of a dotted one
    close = next((known for known in names if known.endswith(f".{name}")), "") or nearest(name, names, cutoff=0.3)
    hint = f"did you mean {close}?" if close else f"there are {', '.join(names[:8])}"
    raise ConfigError(f"{kind}: no run has {name!r}; {hint}")


def _varies(key: str) -> bool:
    parts = key.split(".")
    return parts[0] not in PLACE_GROUPS and parts[-1] not in PLACE_NAMES and not parts[-1].endswith("_dir")


def differing(runs: Sequence[Run]) -> list[str]:
    """Every axis with more than one value, then the fewest settings, taken in order, that tell apart the runs which the
    axes do not; seeds and places left out."""
    chosen = [key for key in IDENTITY if len({run.settings[key] for run in runs}) > 1]
    labels = [tuple(run.settings[key] for key in chosen) for run in runs]
    others = dict.fromkeys(key for run in runs for key in run.settings if key not in IDENTITY)
    for key in filter(_varies, others):
        finer = [(*label, run.settings.get(key, "-")) for label, run in zip(labels, runs, strict=True)]
        if len(set(finer)) > len(set(labels)):
            chosen.append(key)
            labels = finer
    return chosen or ["tuning", "compression"]


def watched(runs: Sequence[Run]) -> list[str]:
    """The test scores that the runs watch, each once."""
    return list(dict.fromkeys(f"after.test.{run.metric}" for run in runs))


def cell(runs: Iterable[Run], metric: str) -> Cell:
    """Mean and sample deviation of a metric over runs; runs without a value are left out of the count."""
    values = [value for run in runs if (value := run.metrics.get(metric)) is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Cell(count=len(values), mean=statistics.fmean(values) if values else None, spread=spread)


def _natural(key: tuple[str, ...]) -> list[tuple[int, float, str]]:
    def one(text: str) -> tuple[int, float, str]:
        try:
            return (0, float(text), text)
        except ValueError:
            return (1, 0.0, text)

    return [one(text) for text in key]


def _baseline(text: str, rows: Sequence[str], keys: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The one row that `key=value[,key=value]` names. ConfigError if it names none or several."""
    wanted: dict[str, str] = {}
    for part in re.split(r",(?![^\[]*\])", text):
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise ConfigError(f"baseline: {part!r} is not key=value; the rows' keys are {', '.join(rows)}")
        if name not in rows:
            _unknown("baseline", name, rows)
        wanted[name] = value.replace(" ", "")

    def fits(key: tuple[str, ...]) -> bool:
        values = dict(zip(rows, key, strict=True))
        return all(values[name] in (value, f"[{value}]") for name, value in wanted.items())

    found = [key for key in keys if fits(key)]
    if len(found) == 1:
        return found[0]
    shown = "; ".join(_named(rows, key) for key in (found or keys)[:6])
    problem = "names several rows, say which" if found else "names no row, there are"
    raise ConfigError(f"baseline: {text!r} {problem}: {shown}")


def _named(rows: Sequence[str], key: Sequence[str]) -> str:
    return ",".join(f"{name}={value}" for name, value in zip(rows, key, strict=True))


def _change(metric: str, mean: float | None, base: float | None) -> float | None:
    if mean is None or base is None:
        return None
    if is_score(metric):
        return mean - base
    return mean / base if base else None


def _repeats(groups: Iterable[Group], rows: Sequence[str]) -> Iterator[str]:
    for group in groups:
        seeds = [run.settings["seed"] for run in group.runs]
        if len(set(seeds)) < len(seeds) and "seed" not in rows:
            count = f"{len(seeds)} runs but {len(set(seeds))} seeds"
            yield f"{_named(rows, group.key)}: {count}; its spread is not over seeds"


def _check(kind: str, names: Iterable[str], known: Sequence[Mapping[str, Any]]) -> None:
    for name in names:
        if not any(name in of_run for of_run in known):
            _unknown(kind, name, (key for of_run in known for key in of_run))


def tabulate(
    runs: Sequence[Run], rows: Sequence[str] = (), metrics: Sequence[str] = (), baseline: str | None = None
) -> Table:
    """Groups runs by the settings `rows` (default: `differing`) and averages `metrics` over each group.

    Scores change by difference, costs by ratio, to the row `baseline` ("key=value[,key=value]").
    ConfigError, with the nearest name, for a key or metric that no run has.
    """
    if not runs:
        raise ConfigError("report: no finished run to tabulate")
    rows = tuple(rows) or tuple(differing(runs))
    metrics = tuple(metrics) or (*watched(runs), *COSTS)
    _check("rows", rows, [run.settings for run in runs])
    _check("metrics", metrics, [run.metrics for run in runs])
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(run.settings.get(name, "-") for name in rows), []).append(run)
    groups = [
        Group(key=key, runs=tuple(members[key]), cells={name: cell(members[key], name) for name in metrics})
        for key in sorted(members, key=_natural)
    ]
    made = Table(rows=rows, metrics=metrics, groups=tuple(groups), notes=tuple(_repeats(groups, rows)))
    return made if baseline is None else _compared(made, _baseline(baseline, rows, list(members)))


def _compared(table: Table, key: tuple[str, ...]) -> Table:
    base = next(group for group in table.groups if group.key == key).cells

    def against(group: Group) -> Group:
        changes = {name: _change(name, one.mean, base[name].mean) for name, one in group.cells.items()}
        return replace(group, cells={name: replace(one, change=changes[name]) for name, one in group.cells.items()})

    return replace(table, groups=tuple(map(against, table.groups)), baseline=key)


def _cell_text(metric: str, one: Cell, of: int) -> str:
    if one.mean is None:
        return "-"
    text = with_spread(metric, one.mean, one.spread)
    if one.change is not None:
        text += f" ({one.change:+.4f})" if is_score(metric) else f" ({one.change:.2f}x)"
    return text if one.count == of else f"{text} [n={one.count}]"


def to_markdown(table: Table) -> str:
    """The table as GitHub markdown: mean ± sample deviation (change to the baseline)."""
    header = [*table.rows, "n", *(name.removeprefix("after.") for name in table.metrics)]
    rows = [
        [*group.key, str(len(group.runs))]
        + [_cell_text(name, group.cells[name], len(group.runs)) for name in table.metrics]
        for group in table.groups
    ]
    legend = "mean ± sample standard deviation over n runs"
    if table.baseline is not None:
        base = _named(table.rows, table.baseline)
        legend += f"; in brackets against {base}: difference of scores, ratio of costs"
    lines = [markdown_table(header, rows), "", legend, *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def to_csv(table: Table, path: Path) -> None:
    """The table in full precision: for each metric its mean, `.std`, `.n` and, with a baseline, `.change`."""
    parts = ["", ".std", ".n", *([".change"] if table.baseline is not None else [])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*table.rows, "n", *(name + part for name in table.metrics for part in parts)])
        for group in table.groups:
            values: list[Any] = [*group.key, len(group.runs)]
            for one in group.cells.values():
                values += [one.mean, one.spread, one.count, one.change][: len(parts)]
            writer.writerow(["" if value is None else value for value in values])


def _label(rows: Sequence[str], key: Sequence[str]) -> str:
    """A row's name in the picture: bare values of the axes, `name=value` for other settings."""
    words = []
    for name, value in zip(rows, key, strict=True):
        bare = value.strip("[]").replace(",", " + ") or f"no {name}"
        if value != "-":
            words.append(bare if name in IDENTITY else f"{name.rpartition('.')[2]} {bare}")
    return ", ".join(words)


def to_picture(
    table: Table | Sequence[Run], path: Path, x: str = "after.bytes", y: str = "after.test.accuracy"
) -> None:
    """Scatter of score `y` against cost `x`, a point a row, with spreads and the Pareto front.

    ConfigError for a metric that no run has, or if no row has both.
    """
    from niwaki.measure.plots import Spot, draw_scatter

    made = table if isinstance(table, Table) else tabulate(table)
    runs = [run for group in made.groups for run in group.runs]
    _check("metrics", (x, y), [run.metrics for run in runs])
    spots = []
    for group in made.groups:
        across, up = cell(group.runs, x), cell(group.runs, y)
        if across.mean is not None and up.mean is not None:
            label = _label(made.rows, group.key)
            spread = {"x_spread": across.spread, "y_spread": up.spread}
            spots.append(Spot(label=label, x=across.mean, y=up.mean, **spread))
    if not spots:
        raise ConfigError(f"report: no row has both {x} and {y}; choose another x or y")
    modes = {run.metric: run.mode for run in runs}
    better = [more_is_better(name, modes) for name in (x, y)]
    missing = len(made.groups) - len(spots)
    note = f"{missing} row{'s' * (missing > 1)} without both values left out" if missing else ""
    draw_scatter(spots, path, x=x, y=y, x_more=better[0], y_more=better[1], note=note)


def save(table: Table, output: Path, x: str | None = None, y: str | None = None) -> None:
    """Writes report.md, report.csv and report.png into the folder `output`, made if need be."""
    runs = [run for group in table.groups for run in group.runs]
    output.mkdir(parents=True, exist_ok=True)
    to_csv(table, output / "report.csv")
    text = f"# {len(runs)} runs\n\n{to_markdown(table)}\n![score against cost](report.png)\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    to_picture(table, output / "report.png", x or "after.bytes", y or watched(runs)[0])


def report_command(
    folders: Sequence[Path],
    rows: Sequence[str] = (),
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    output: Path | None = None,
    x: str | None = None,
    y: str | None = None,
) -> None:
    """Prints the table of every run in `folders`; with `output`, also writes it there."""
    finished, unfinished = find(folders)
    if not finished:
        raise ConfigError(f"report: no run has finished; not yet: {', '.join(map(str, unfinished[:6]))}")
    table = tabulate([read_run(folder) for folder in finished], rows, metrics, baseline)
    if unfinished:
        note = f"not finished, left out: {', '.join(map(str, unfinished))}"
        table = replace(table, notes=(*table.notes, note))
    print(to_markdown(table))
    if output is not None:
        save(table, output, x, y)
