"""How fast each form of a run's model is: dense and compressed, in torch, compiled, and as every export.

All take turns on the same texts in one process. Memory is that of a fresh process for each: the resident memory that is
added by loading the model and running it, once torch, transformers, ONNX Runtime and the model's code are imported.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from niwaki import artifact
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.export.export import Export
from niwaki.export.onnx import Onnx
from niwaki.measure.machine import machine
from niwaki.measure.report import markdown_table, number
from niwaki.measure.speed import THROUGHPUT_BATCH, Inputs, rate, seconds
from niwaki.model.anatomy import Anatomy
from niwaki.recipe import Recipe

SINGLES = 5  # rows of a round, one at a time; beside one batch
BATCHES = 4
LONGEST_PROBLEM = 200  # characters


@dataclass
class Contender:
    """One form of the model: an artifact in torch, or an export by its `format`. `problem`: why it has no numbers."""

    name: str
    folder: Path
    corpus: Corpus
    format: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = False
    bytes: int | None = None
    problem: str | None = None

    def load(self) -> Any:
        """A function of inputs."""
        return load(str(self.folder), self.format, self.settings, compiled=self.compiled)

    def inputs(self, size: int, count: int) -> list[Inputs]:
        """Of the test rows; the same texts for all, in the tokens that this one reads."""
        return [self.corpus.task.inputs(batch) for batch in self.corpus.samples("test", size, count)]


def load(folder: str, format: str | None, settings: Mapping[str, Any], *, compiled: bool) -> Any:
    """The model in a folder, in its own runtime."""
    if format is not None:
        from niwaki.export.command import chosen

        return chosen(format, [f"{name}={json.dumps(value)}" for name, value in settings.items()]).runner(Path(folder))
    model = artifact.load(folder).model
    return whole_graph(model) if compiled else model


def whole_graph(model: Any) -> Any:
    """The model, compiled after its first inputs: what products take is made in a first pass, which breaks a graph."""
    compiled, ran = torch.compile(model, dynamic=True), False

    def run(**inputs: Any) -> Any:
        nonlocal ran
        if not ran:
            model(**inputs)
            ran = True
        return compiled(**inputs)

    return run


def speed_table(recipe: Recipe, corpus: Corpus, folder: Path, repeats: int) -> dict[str, Any]:
    """Rows for the dense model and for the run's artifact with its exports, all on the CPU in `repeats` rounds.

    `latency_ms_p50` and `_p95`: milliseconds of one row; `throughput`: rows per second in batches, the median;
    `memory_mb`; `bytes` of the weights, or of the exported files.
    """
    with tempfile.TemporaryDirectory() as place:
        contenders = [*dense(recipe, corpus, Path(place)), *of_run(recipe, corpus, folder)]
        timed = race(contenders, repeats)
        rows = [
            {"name": one.name, "bytes": one.bytes, **timed.get(one.name, {}),
             "memory_mb": None if one.problem else added_memory(one), "problem": one.problem}
            for one in contenders
        ]  # fmt: skip
    singles, batches = (contenders[-1].inputs(*size) for size in ((1, SINGLES * repeats), (THROUGHPUT_BATCH, BATCHES)))
    lengths = [one["input_ids"].shape[1] for one in singles]
    return {
        "rows": rows,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "rounds": repeats,
        "batch": len(batches[0]["input_ids"]),
        "lengths": {
            "mean": statistics.mean(lengths), "longest": max(lengths),
            "of_batches": statistics.mean(one["input_ids"].shape[1] for one in batches),
        },
    }  # fmt: skip


def dense(recipe: Recipe, corpus: Corpus, place: Path) -> Iterator[Contender]:
    """The model as it was loaded, as an artifact and as an ONNX file, in a folder that goes again."""
    corpus = corpus.as_loaded
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed).eval()
    base_config = model.config.to_dict()
    artifact.save(
        place / "dense", model=model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=base_config, edits=recipe.model.cut(model), columns=corpus.columns,
    )  # fmt: skip
    yield Contender("dense, eager", place / "dense", corpus, bytes=artifact.weight_bytes(place / "dense"))
    onnx = Contender("dense, ONNX Runtime", place / "onnx", corpus, "onnx")
    try:
        onnx.bytes = written(Onnx(), place / "dense", place / "onnx", corpus)
    except Exception as error:  # of the exporter: the other rows stay
        onnx.problem = said(error)
    yield onnx


def written(one: Export, saved: Path, folder: Path, corpus: Corpus) -> int:
    """Write an export of an artifact; its bytes."""
    from niwaki.export.exports import write

    held = artifact.load(saved)
    one.check(held.task, Anatomy.of(held.model))
    folder.mkdir()
    return int(write(one, held, folder, corpus)["bytes"])


def of_run(recipe: Recipe, corpus: Corpus, folder: Path) -> Iterator[Contender]:
    """The artifact of a run, as it is and compiled, and each export that is there."""
    size = artifact.weight_bytes(folder / "model")
    yield Contender("artifact, eager", folder / "model", corpus, bytes=size)
    yield Contender("artifact, compiled", folder / "model", corpus, compiled=True, bytes=size)
    for one in recipe.export.values():
        place = folder / "exports" / one.name
        found = Contender(f"export={one.name}", place, corpus, one.name, dataclasses.asdict(one))
        if (place / "export.json").is_file():
            found.bytes = json.loads((place / "export.json").read_text(encoding="utf-8"))["bytes"]
        else:
            found.problem = "was not written"
        yield found


def race(contenders: Sequence[Contender], repeats: int) -> dict[str, dict[str, float]]:
    """Times of those that run, by name; what goes wrong in one becomes its `problem`. In each round all take turns,
    each with the same single rows and then the same batch, after all inputs were met once."""
    running = {}
    for one in contenders:
        singles, batches = one.inputs(1, SINGLES * repeats), one.inputs(THROUGHPUT_BATCH, BATCHES)
        if one.problem:
            continue
        try:
            model = one.load()
            run_all(model, (*singles, *batches))
        except Exception as error:  # of a compiler or of a runtime: the other rows stay
            one.problem = said(error)
        else:
            running[one.name] = model, singles, batches
    latencies: dict[str, list[float]] = {name: [] for name in running}
    rates: dict[str, list[float]] = {name: [] for name in running}
    with torch.inference_mode():
        for turn in range(repeats):
            for name, (model, singles, batches) in running.items():
                rows = [singles[(turn * SINGLES + n) % len(singles)] for n in range(SINGLES)]
                latencies[name] += [1000 * seconds(model, row) for row in rows]
                rates[name].append(rate(model, batches[turn % len(batches)]))
    return {
        name: {
            "latency_ms_p50": statistics.median(latencies[name]),
            "latency_ms_p95": statistics.quantiles(latencies[name], n=20, method="inclusive")[-1],
            "throughput": statistics.median(rates[name]),
        }
        for name in running
    }


def run_all(model: Any, inputs: Sequence[Inputs]) -> None:
    """One pass on each."""
    with torch.inference_mode():
        for one in inputs:
            model(**one)


def said(error: Exception) -> str:
    """What an error says, in one short line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:LONGEST_PROBLEM]


def added_memory(one: Contender) -> float | None:
    """MB that the model adds to a fresh process; None where the system does not tell."""
    if not Path("/proc/self/statm").is_file():
        return None
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "inputs.pt"
        torch.save([*one.inputs(1, 3), *one.inputs(THROUGHPUT_BATCH, 1)], file)
        given = {
            "folder": str(one.folder), "format": one.format, "settings": dict(one.settings), "compiled": one.compiled,
            "inputs": str(file), "threads": torch.get_num_threads(), "model_type": model_type(one.corpus, one.folder),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "niwaki.measure.speed_table", json.dumps(given)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def model_type(corpus: Corpus, folder: Path) -> str | None:
    """Whose code a process imports before it counts; exports need none."""
    config = folder / "config.json"
    return json.loads(config.read_text(encoding="utf-8"))["model_type"] if config.is_file() else None


def count_memory(given: Mapping[str, Any]) -> float:
    """In a fresh process: MB of resident memory after the model ran, less those before it was loaded."""
    torch.set_num_threads(given["threads"])
    inputs = torch.load(given["inputs"])
    if given["model_type"] is not None:
        name = given["model_type"].replace("-", "_")
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    for runtime in ("onnxruntime", *(("torch._inductor.compile_fx",) if given["compiled"] else ())):
        if importlib.util.find_spec(runtime.partition(".")[0]):
            importlib.import_module(runtime)
    if given["format"] is not None:  # what reads a setting, and what asks the runtime how it sums
        from niwaki.export.command import chosen
        from niwaki.export.runner import sums_are_exact

        chosen(given["format"], [])
        if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
            sums_are_exact()
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = resident_mb()
    model = load(given["folder"], given["format"], given["settings"], compiled=given["compiled"])
    run_all(model, inputs)
    return resident_mb() - before


def resident_mb() -> float:
    """Of this process, once what is free has been handed back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def speed_text(table: Mapping[str, Any]) -> str:
    """The table in markdown, with what it was measured on."""
    rows = table["rows"]
    first = rows[0].get("throughput")
    shown = [[row["name"], *cells(row, first)] for row in rows]
    header = ["", "latency, p50", "p95", f"throughput, batch {table['batch']}", "of the first", "memory", "on disk"]
    lengths = table["lengths"]
    note = (
        f"{table['machine']}, {table['threads']} threads; {table['rounds']} rounds in turns; test rows of "
        f"{lengths['mean']:.0f} tokens on average, batches of {lengths['of_batches']:.0f}; one pass each, of "
        "what writes texts too; ONNX Runtime's threads do not spin while they wait. Memory: what loading and running "
        "the model adds to a fresh process."
    )
    problems = [f"{row['name']}: {row['problem']}" for row in rows if row["problem"]]
    return "\n\n".join([markdown_table(header, shown), note, *problems])


def cells(row: Mapping[str, Any], first: float | None) -> list[str]:
    """The numbers of a row; `first` is the throughput that others are compared to."""
    throughput = row.get("throughput")
    return [
        number("latency_ms", row.get("latency_ms_p50")), number("latency_ms", row.get("latency_ms_p95")),
        number("throughput", throughput), f"{throughput / first:.2f}x" if first and throughput else "-",
        number("peak_memory_mb", row["memory_mb"]), number("bytes", row["bytes"]),
    ]  # fmt: skip


def speed_command(place: Path, repeats: int) -> dict[str, Any]:
    """The table of a run that is there already."""
    import yaml

    from niwaki import compose, pipeline

    if not (place / "config.yaml").is_file() or not artifact.is_artifact(place / "model"):
        raise ConfigError(f"speed {place}: needs the folder of a run, with config.yaml and model/ in it")
    recipe = compose.build(yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")))
    return speed_table(recipe, pipeline.read(recipe), place, repeats)


if __name__ == "__main__":
    from niwaki.quiet import quiet_libraries

    quiet_libraries()
    print(count_memory(json.loads(sys.argv[1])))
