"""What a run leaves for people: report.md, report.png and the table on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

CONTRACT = frozenset(  # of metrics.json; what else stands there was added by methods
    [
        "schema",
        "task",
        "tuning",
        "compression",
        "seed",
        "data",
        "model",
        "metric",
        "mode",
        "before",
        "after",
        "trainable",
        "train_seconds",
        "steps",
        "peak_memory_mb",
        "parity",
        "validation",
        "targets",
        "savings",
        "per_class",
        "averages",
        "exports",
        "speed",
        "machine",
        "threads",
        "versions",
    ]
)
LONGEST_FACT = 12  # entries
Row = tuple[str, ...]
Change = Callable[[float, float], str]
CLASS_COLUMNS = ("precision", "recall", "f1", "support")
BEFORE = "`before`: the model as loaded, its new head untrained; `after`: the artifact, saved and loaded again."


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {"a.b.c": leaf}; a list or an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def duration(seconds: float) -> str:
    """Seconds as people say them: `0.4 s`, `42 s`, `6 min`, `1.5 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _scaled(value: float, units: Sequence[str]) -> str:
    """Three digits and a decimal unit: 22713216 -> 22.7 MB."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}{units[power]}"


def _count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "G", "T"))


def _bytes(value: float) -> str:
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _score(value: float) -> str:
    if 0 < abs(value) < 0.001:
        return f"{value:.2g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _speed(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


UNITS: dict[str, Callable[[float], str]] = {
    "bytes": _bytes,
    "parameters": _count,
    "nonzero": _count,
    "trainable": _count,
    "macs": _count,
    "steps": lambda value: f"{value:,.0f}",
    "threads": lambda value: f"{value:,.0f}",
    "sparsity": lambda value: f"{100 * value:.1f}%",
    "latency_ms": lambda value: f"{_speed(value)} ms",
    "throughput": lambda value: f"{_speed(value)} rows/s",
    "peak_memory_mb": lambda value: f"{value:,.0f} MB",
    "train_seconds": duration,
}


def number(name: str, value: float | None) -> str:
    """`value` in the unit of the metric `name` (its last dotted part), `-` where there is none."""
    return "-" if value is None else UNITS.get(name.rpartition(".")[2], _score)(value)


def with_spread(name: str, mean: float, spread: float | None) -> str:
    """`8.10 ± 0.04 ms`: the unit once where both have the same, `-` for the spread of a single value."""
    if spread is None or spread == 0:
        return f"{number(name, mean)} ± {'-' if spread is None else '0'}"
    if is_score(name):
        return f"{number(name, mean)} ± {spread:.4f}"
    (value, space, unit), around = number(name, mean).partition(" "), number(name, spread)
    same = space and around.endswith(f" {unit}")
    return f"{value} ± {around}" if same else f"{value}{space}{unit} ± {around}"


def ratio(less: str, more: str) -> Change:
    """A change as a factor of at least one and a word: `3.9x smaller`."""

    def change(before: float, after: float) -> str:
        if before <= 0 or after <= 0:
            return "same" if before == after else "-"
        factor = max(before / after, after / before)
        shown = f"{factor:.2f}" if factor < 2 else f"{factor:.1f}" if factor < 100 else f"{factor:,.0f}"
        return "same" if shown == "1.00" else f"{shown}x {less if after < before else more}"

    return change


def _points(before: float, after: float) -> str:
    return f"{100 * (after - before):+.1f} points"


def difference(before: float, after: float) -> str:
    """A change of a score, with its sign."""
    return f"{after - before:+.4f}"


# name, label, words for less and for more of it; counts are shown in full
COSTS: tuple[tuple[str, str, Change], ...] = (
    ("parameters", "parameters", ratio("fewer", "more")),
    ("nonzero", "non-zero parameters", ratio("fewer", "more")),
    ("sparsity", "sparsity", _points),
    ("bytes", "bytes on disk", ratio("smaller", "larger")),
    ("latency_ms", "latency, batch 1", ratio("faster", "slower")),
    ("throughput", "throughput, batch 32", ratio("slower", "faster")),
    ("macs", "MACs", ratio("fewer", "more")),
)
IN_FULL = ("parameters", "nonzero")
MORE_IS_BETTER = ("throughput", "sparsity")
LESS_IS_BETTER = ("loss", "perplexity", "error", "mae", "mse", "rmse", "wer", "cer", "bits_per_byte", "ece")


def is_score(name: str) -> bool:
    """Whether a metric's dotted name is a task's score (compared by difference) and not a cost (by ratio)."""
    return "test" in name.split(".")[:-1] or "validation" in name.split(".")[:-1]


def more_is_better(name: str, modes: Mapping[str, str]) -> bool:
    """Direction of any metric; `modes` has what runs say of those they watch: {"perplexity": "min"}."""
    last = name.rpartition(".")[2]
    if not is_score(name):
        return last in MORE_IS_BETTER
    return modes[last] == "max" if last in modes else last not in LESS_IS_BETTER


def sparsity(side: Mapping[str, Any]) -> float | None:
    """Share of zeros among all parameters of one side (`before` or `after`)."""
    if not side.get("parameters") or side.get("nonzero") is None:
        return None
    return 1 - side["nonzero"] / side["parameters"]


def _show(name: str, value: float | None) -> str:
    return f"{value:,}" if name in IN_FULL and value is not None else number(name, value)


def comparison(metrics: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Header and rows of the before/after table; only `after` where `before` was not measured."""
    before, after = metrics["before"] or {}, metrics["after"]
    scores = [(f"test.{name}", f"test {name}", difference) for name in after["test"]]
    sides = [{**flatten(side), "sparsity": sparsity(side)} for side in (before, after)]
    rows: list[Row] = []
    for name, label, change in (*scores, *COSTS):
        old, new = (side.get(name) for side in sides)
        changed = "-" if old is None or new is None else change(old, new)
        rows.append((label, _show(name, old), _show(name, new), changed))
    if metrics["before"] is None:
        return ("", "after"), [(row[0], row[2]) for row in rows]
    return ("", "before", "after", "change"), rows


def table(metrics: Mapping[str, Any]) -> Table:
    """The before/after table for the terminal, from one run's metrics (schema 1)."""
    from rich.table import Table

    header, rows = comparison(metrics)
    shown = Table(header_style="bold")
    for column in header:
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table; the first column to the left, the others to the right."""
    marks = [":---", *["---:"] * (len(header) - 1)]
    lines = [header, marks, *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def compression_name(metrics: Mapping[str, Any]) -> str:
    """The methods of a run in one word: `prune/magnitude + quantize/qat`, or `no compression`."""
    return " + ".join(metrics["compression"]) or "no compression"


def _what(metrics: Mapping[str, Any]) -> str:
    parts = [
        f"**{metrics['task']}** on `{metrics['data']}`",
        f"model `{metrics['model']}`",
        f"tuning `{metrics['tuning']}`",
        f"compression `{compression_name(metrics)}`" if metrics["compression"] else "no compression",
        f"seed {metrics['seed']}",
    ]
    return ", ".join(parts) + "."


def _settings(config: Mapping[str, Any]) -> str:
    flat = {key: "null" if value is None else value for key, value in flatten(config).items()}
    lines = [f"{key}={value}" for key, value in flat.items() if not key.startswith("hydra.") and "_target_" not in key]
    return _folded(f"Settings ({len(lines)})", "```\n" + "\n".join(lines) + "\n```")


def _spread(values: Sequence[float], weights: Sequence[float], show: Callable[[float], str]) -> list[str]:
    mean = sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
    return [show(min(values)), show(mean), show(max(values))]


PER_LAYER: dict[str, Callable[[float], str]] = {
    "sparsity": lambda value: f"{100 * value:.2f}%",
    "bits": lambda value: f"{value:g}",
}


def _targets(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """Sparsity and bits of the compressed linears: least, mean by parameters, most; the list below."""
    rows = []
    for name, show in PER_LAYER.items():
        known = [target for target in targets.values() if target.get(name) is not None]
        if known:
            weights = [max(target["parameters"], 1) for target in known]
            spread = _spread([target[name] for target in known], weights, show)
            rows.append([name, str(len(known)), *spread])
    full = [
        [f"`{name}`", f"{target['parameters']:,}"]
        + [show(target[key]) if target.get(key) is not None else "-" for key, show in PER_LAYER.items()]
        for name, target in targets.items()
    ]
    summary = markdown_table(["", "layers", "least", "mean (by parameters)", "most"], rows)
    listed = markdown_table(["layer", "parameters", "sparsity", "bits"], full)
    return f"{summary}\n\n{_folded(f'All {len(targets)} layers', listed)}"


def _class_row(name: str, scores: Mapping[str, Any]) -> list[str]:
    shown = [number(column, scores.get(column)) for column in CLASS_COLUMNS[:3]]
    return [name, *shown, f"{scores['support']:,.0f}"]


def kernel_line(kernels: Mapping[str, int]) -> str:
    """What multiplies the packed weights of the artifact, in one line."""
    return "Products with packed weights: " + "; ".join(f"{count} by {name}" for name, count in kernels.items()) + "."


def classes(metrics: Mapping[str, Any]) -> str:
    """Precision, recall, F1 and support of each class (`per_class`), and their `averages`, in markdown."""
    averages = metrics.get("averages") or {}
    rows = [_class_row(name, scores) for name, scores in metrics["per_class"].items()]
    rows += [_class_row(f"*{name} average*", scores) for name, scores in averages.items()]
    return markdown_table(["class", *CLASS_COLUMNS], rows)


def exports(metrics: Mapping[str, Any]) -> str:
    """Every export beside the artifact, in markdown: each scored as exported, and timed in turns with the artifact."""
    found = metrics["exports"]
    beside = [one["artifact"] for one in found.values() if one.get("artifact")]
    timed: dict[str, Any] = beside[0] if beside else {}
    sides = {"artifact": {"test": metrics["after"]["test"], "bytes": metrics["after"]["bytes"], **timed}, **found}
    speed = ["latency_ms", "throughput"]
    again = [f"artifact.{name}" for name in speed] if len(beside) > 1 else []
    names = [*(f"test.{name}" for name in metrics["after"]["test"]), "bytes", *speed, *again, "parity"]
    labels = {name: label for name, label, _ in COSTS} | {"parity": "largest logit difference"}
    labels |= {f"artifact.{name}": f"of the artifact in the same turns: {labels[name]}" for name in speed}
    flat = {name: flatten(side) for name, side in sides.items()}
    rows = [
        [labels.get(name, name.replace(".", " ")), *(number(name, side.get(name)) for side in flat.values())]
        for name in names
    ]
    rows.append(["runtime", *(str(side.get("runtime", "torch")) for side in flat.values())])
    return markdown_table(["", *sides], rows)


def _training(metrics: Mapping[str, Any]) -> str:
    whole = (metrics["before"] or metrics["after"])["parameters"]
    trainable = f"{metrics['trainable']:,} ({100 * metrics['trainable'] / whole:.2f}% of {whole:,})"
    memory = number("peak_memory_mb", metrics["peak_memory_mb"])
    rows = [
        ["steps", number("steps", metrics["steps"])],
        ["time", number("train_seconds", metrics["train_seconds"])],
        ["trainable parameters", trainable],
        ["peak memory (GPU: of the fit; CPU: of the whole process)", memory],
        ["parity (largest logit difference, save to reload)", number("parity", metrics["parity"])],
    ]
    validation = metrics.get("validation") or {}
    rows += [[f"validation {name}", number(name, value)] for name, value in validation.items()]
    return markdown_table(["", ""], rows)


def _machine(metrics: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (metrics.get("versions") or {}).items())
    machine = metrics.get("machine") or "machine unknown"
    return f"{machine}, {metrics.get('threads')} threads. {versions}".strip()


def facts(metrics: Mapping[str, Any]) -> str:
    """What the methods of a run said of themselves (the ranks that AdaLoRA left), in markdown; empty where none did.
    What is long stays in metrics.json."""
    rows = []
    for name, value in metrics.items():
        if name in CONTRACT:
            continue
        leaves = flatten({name: value})
        shown = leaves if len(leaves) <= LONGEST_FACT else {name: f"{len(leaves)} entries, in metrics.json"}
        rows += [[key.replace(".", " "), _fact(leaf)] for key, leaf in shown.items()]
    return markdown_table(["", ""], rows) if rows else ""


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return _score(value)
    if isinstance(value, list | tuple) and len(value) > LONGEST_FACT:
        return f"{len(value)} entries, in metrics.json"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def markdown(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The text of report.md."""
    header, rows = comparison(metrics)
    note = [BEFORE] if metrics["before"] is not None else []
    parts = ["# Report", _what(metrics), "![report](report.png)", markdown_table(header, rows), *note]
    if kernels := metrics["after"].get("kernels"):
        parts.append(kernel_line(kernels))
    if metrics.get("savings"):
        from niwaki.measure.savings import savings_text

        parts += ["## What it saves", savings_text(metrics)]
    if found := facts(metrics):
        parts += ["## Of the methods", found]
    if metrics.get("targets"):
        parts += ["## Compressed layers", _targets(metrics["targets"])]
    if metrics.get("exports"):
        parts += ["## Exports", exports(metrics)]
    if metrics.get("speed"):
        from niwaki.measure.speed_table import speed_text

        parts += ["## Speed", speed_text(metrics["speed"])]
    if metrics.get("per_class"):
        parts += ["## Classes", classes(metrics)]
    parts += ["## Training", _training(metrics), "## Settings", _settings(config)]
    return "\n\n".join([*parts, "## Machine", _machine(metrics)]) + "\n"


def write_report(folder: Path, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes report.md and report.png of one run (metrics of schema 1, the resolved config) into `folder`."""
    from niwaki.measure.plots import draw_report

    draw_report(metrics, folder / "report.png")
    (folder / "report.md").write_text(markdown(metrics, config), encoding="utf-8")
