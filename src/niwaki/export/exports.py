"""An artifact goes out: written, loaded by its own runtime, held to the artifact on real rows, scored and timed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from niwaki import __version__, artifact
from niwaki.errors import UserError
from niwaki.export.export import Export, ExportError
from niwaki.export.runner import OnnxWriter, StepByStep, Writer
from niwaki.measure.evaluate import evaluate
from niwaki.measure.speed import THROUGHPUT_BATCH, speeds
from niwaki.task.task import IGNORED

if TYPE_CHECKING:
    from niwaki.artifact import Artifact
    from niwaki.data.corpus import Corpus
    from niwaki.export.runner import Runner
    from niwaki.task.task import Task

CARD = "export.json"
ROWS, PARTS = 8, 4  # of the test split, on which logits are compared
USUAL = 0.2  # of the bound, at the median, since most inputs are rounded alike
STEPS = 20  # tokens of each row that a decoder with a cache reads one at a time


@dataclass(frozen=True)
class Rows:
    """What an export is judged on: the test rows, and how the artifact did on them."""

    corpus: Corpus
    scores: Mapping[str, float]
    repeats: int  # timed rounds


def export_all(
    exports: Iterable[Export], place: Path, folder: Path, rows: Rows
) -> tuple[dict[str, dict[str, Any]], list[ExportError]]:
    """Every export of the artifact at `place`, each to a folder of its own below `folder`; the numbers of those that
    are good, and what is wrong with the others."""
    found, failures = {}, []
    for one in exports:
        try:
            found[one.name] = export(one, place, folder / one.name, rows)
        except ExportError as error:
            failures.append(error)
    if failures and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return found, failures


def export(one: Export, place: Path, folder: Path, rows: Rows) -> dict[str, Any]:
    """Write `folder`, whole or not at all; what was measured of what it holds.

    Raises:
        ExportError: it cannot be written, or does not say what the artifact says.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        facts = write(one, artifact.load(place), partial, rows.corpus)
        runner = one.runner(partial)
        found = judged(one, artifact.load(place), runner, rows)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except UserError as error:
        raise ExportError(f"export={one.name}: {error}") from error
    except Exception as error:  # of the exporter or of a runtime: what else the run measured must stay
        said = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"export={one.name}: {type(error).__name__}: {said}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"bytes": facts["bytes"], **found}


def write(one: Export, saved: Artifact, folder: Path, corpus: Corpus) -> dict[str, Any]:
    """The model, the tokenizer and `export.json`, which it returns."""
    before = artifact.checksum(artifact.weights_of(saved.folder))
    facts = one.write(saved, example(corpus), folder)
    of_tokenizer = {Path(path).name for path in saved.tokenizer.save_pretrained(folder)}
    files = {path.relative_to(folder).as_posix(): artifact.stamp(path) for path in files_of(folder)}
    card = {
        "schema": 1,
        "niwaki": __version__,
        "format": one.name,
        "task": saved.task.name,
        "labels": list(saved.labels),
        "max_length": saved.task.max_length,
        **facts,
        "bytes": sum(stamp["bytes"] for name, stamp in files.items() if name not in of_tokenizer),
        "weights_of_artifact": before,
        "files": files,
    }
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def example(corpus: Corpus) -> dict[str, Tensor]:
    """Two rows of the test split, as a model reads them; one row twice where there are no more."""
    batch = corpus.task.inputs(corpus.samples("test", 2, 1)[0])
    return {name: torch.cat([tensor, tensor]) if len(tensor) == 1 else tensor for name, tensor in batch.items()}


def judged(one: Export, saved: Artifact, runner: Runner, rows: Rows) -> dict[str, Any]:
    """Scores, parity and speed of an export.

    Raises:
        ExportError: its logits, or its scores, are further from those of the artifact than the method states.
    """
    corpus, model, bound = rows.corpus, saved.model, one.bound(saved.model)
    samples = corpus.samples("test", ROWS, PARTS)
    off, usual, largest = differences(model, runner, samples, corpus)
    check_logits(off, usual, largest, bound, "its logits")
    if isinstance(runner, OnnxWriter):
        stepped, usual, _ = differences(model, StepByStep(runner, STEPS), samples, corpus)
        check_logits(stepped, usual, largest, bound, "its logits, token by token,")
        off = max(off, stepped)
    if isinstance(runner, Writer) and bound is not None:
        check_texts(model, runner, samples[0], corpus.task, bound)
    scores = evaluate(runner, corpus.evaluation("test"), corpus.task, saved.labels, saved.tokenizer).compute()
    check_scores(one, one.loss_allowed(model), corpus.task, scores, rows.scores)
    judgement = {"parity": off, "largest_logit": largest, "bound": bound}
    return {"test": scores, **timed(runner, model, rows), **judgement, "runtime": runner.runtime}


def check_logits(off: float, usual: float, largest: float, bound: float | None, which: str) -> None:
    """Raise ExportError where logits are no numbers, or off by more than the bound, where there is one; most may be off
    by less, since a code that is rounded the other way is an exception."""
    if not isfinite(largest):
        raise ExportError("some logits of the artifact are no finite numbers")
    if not isfinite(off):
        raise ExportError("some logits are no finite numbers, and those of the artifact are")
    if bound is None:
        return
    for found, share, how in ((off, bound, "up to"), (usual, USUAL * bound, "in the middle")):
        if found > share * max(1.0, largest):
            raise ExportError(
                f"{which} are {how} {found:.3g} from those of the artifact, the largest of which is {largest:.3g}; at "
                f"most {share:g} of that is float order or rounding"
            )


def check_texts(model: Any, runner: Writer, batch: Mapping[str, Tensor], task: Task, bound: float) -> None:
    """Raise ExportError where the likeliest texts, token by token, are others than the artifact's, unless the artifact
    itself finds the two tokens at which they part as likely, within the bound."""
    with torch.inference_mode():
        ours, theirs = (task.write(one, batch, num_beams=1) for one in (model, runner))
        width = max(ours.shape[1], theirs.shape[1])
        ours, theirs = (functional.pad(one, (0, width - one.shape[1]), value=IGNORED) for one in (ours, theirs))
        for row in (ours != theirs).any(1).nonzero().flatten().tolist():
            place = int((ours[row] != theirs[row]).int().argmax())
            alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            told = task.retold(alone, ours[row : row + 1])
            logits, _ = task.counted(model(**task.inputs(told)), told)
            logits = logits[place - int((ours[row] != IGNORED).sum())]
            pair = ours[row, place], theirs[row, place]
            if min(pair) < 0 or abs(float(logits[pair[0]] - logits[pair[1]])) > bound * max(
                1.0, float(logits.abs().max())
            ):
                raise ExportError(
                    f"it writes another text than the artifact, from token {place} on, in one of {len(ours)} test rows"
                )


def differences(
    model: Any, runner: Any, batches: Sequence[Mapping[str, Tensor]], corpus: Corpus
) -> tuple[float, float, float]:
    """|logits of the artifact - logits of the export| over the positions that count: the largest, infinity where one is
    no number, and the median of the largest of each position; and the largest |logit of the artifact|. All less the
    mean of their position, which no softmax minds."""
    offs, largest = [torch.zeros(1)], 0.0
    with torch.inference_mode():
        for batch in batches:
            inputs = corpus.task.inputs(batch)
            ours, theirs = (corpus.task.predictions(one(**inputs), batch).float() for one in (model, runner))
            if not ours.numel():
                continue
            ours, theirs = (centred(one) for one in (ours, theirs))
            offs.append((ours - theirs).abs().amax(-1).nan_to_num(inf, posinf=inf).flatten())
            largest = max(largest, float(ours.abs().max().nan_to_num(inf, posinf=inf)))
    found = torch.cat(offs[1:] or offs)
    return float(found.max()), float(found.median()), largest


def centred(logits: Tensor) -> Tensor:
    """Logits (..., classes) less their mean; a single one is a number by itself."""
    return logits - logits.mean(-1, keepdim=True) if logits.shape[-1] > 1 else logits


def check_scores(
    one: Export, allowed: float | None, task: Task, scores: Mapping[str, float], ours: Mapping[str, float]
) -> None:
    """Raise ExportError where a larger share of the task's metric is lost than the export allows."""
    if allowed is None:
        return
    metric = task.metric
    lost = (ours[metric] - scores[metric]) * (1 if task.mode == "max" else -1)
    if not lost <= allowed * abs(ours[metric]):
        raise ExportError(
            f"test {metric} is {scores[metric]:.4f}, that of the artifact {ours[metric]:.4f}; "
            f"export.{one.name}.tolerance={allowed:g} of it may be lost"
        )


def timed(runner: Any, model: Any, rows: Rows) -> dict[str, Any]:
    """Latency and throughput beside those of the artifact on the same machine, taken in turns."""
    if not rows.repeats:
        return {"latency_ms": None, "throughput": None}
    corpus = rows.corpus
    singles, batches = (
        [corpus.task.inputs(batch) for batch in corpus.samples("test", size, count)]
        for size, count in ((1, 8), (THROUGHPUT_BATCH, 4))
    )
    found = speeds({"artifact": model, "export": runner}, singles, batches, rows.repeats)
    return {**found["export"], "artifact": found["artifact"]}
