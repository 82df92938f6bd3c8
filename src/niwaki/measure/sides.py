"""The two sides of a run: the model as it was loaded, and the artifact as it was reloaded."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from niwaki import artifact
from niwaki.data.corpus import Corpus
from niwaki.measure.evaluate import evaluate, largest_difference
from niwaki.measure.machine import machine, versions
from niwaki.measure.report import write_report
from niwaki.measure.savings import savings
from niwaki.measure.size import count, macs, target_table
from niwaki.measure.speed import THROUGHPUT_BATCH, speeds
from niwaki.model.embeddings import InOldNumbers
from niwaki.naming import option_name
from niwaki.recipe import Recipe
from niwaki.weights import kernels

Side = dict[str, Any]


def before(recipe: Recipe, corpus: Corpus, model: Any, folder: Path) -> Side | None:
    """Test scores, parameters and bytes of the model as loaded, its new head untrained."""
    if not recipe.measure.before:
        return None
    model.to(recipe.trainer.device)
    scores = evaluate(model, corpus.evaluation("test"), recipe.task, corpus.labels, corpus.tokenizer).compute()
    model.to("cpu")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / artifact.WEIGHTS
        save_file(artifact.unique_tensors(model), path)
        return {"test": scores, **count(model), "bytes": path.stat().st_size, "kernels": kernels(model)}


def compare(
    recipe: Recipe, corpus: Corpus, model: Any, folder: Path, side_before: Side | None,
    facts: Mapping[str, Any], targets: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The metrics of the run. Everything under `after` is measured on the artifact, loaded from its folder."""
    device = recipe.trainer.device
    saved = artifact.load(folder / "model")
    parity = largest_difference(model.eval().cpu(), saved.model, corpus.samples("test", 8, 4), recipe.task)
    reloaded = saved.model.to(device)
    scores = evaluate(reloaded, corpus.evaluation("test"), recipe.task, corpus.labels, corpus.tokenizer)
    validation = evaluate(reloaded, corpus.evaluation("validation"), recipe.task, corpus.labels, corpus.tokenizer)
    after = {"test": scores.compute(), **count(saved.model), "bytes": artifact.weight_bytes(saved.folder)}
    models = {"after": reloaded}
    if side_before is not None:
        whole = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
        models["before"] = (InOldNumbers(whole, corpus.tokens).eval() if corpus.tokens else whole).to(device)
    measured = cost(recipe, corpus, models)
    after |= {**measured["after"], "kernels": kernels(reloaded)}
    side_before = side_before and {**side_before, **measured["before"]}
    return clean(
        {
            "schema": 1,
            "task": recipe.task.name,
            "tuning": recipe.tuning.name,
            "compression": [stage.name for stage in recipe.stages if stage is not recipe.tuning],
            "seed": recipe.seed,
            "data": option_name(recipe.data),
            "model": recipe.model.title,
            "metric": recipe.task.metric,
            "mode": recipe.task.mode,
            "before": side_before,
            "after": after,
            **facts,
            "parity": parity,
            "validation": validation.compute(),
            "targets": target_table(saved.model, targets),
            "savings": savings(saved, side_before, after),
            **scores.report(),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
    )


def cost(recipe: Recipe, corpus: Corpus, models: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Latency, throughput and multiply-adds per row of each model, taken in turns."""
    device = recipe.trainer.device

    def inputs(size: int, number: int) -> list[dict[str, torch.Tensor]]:
        samples = corpus.samples("test", size, number)
        return [{k: v.to(device) for k, v in recipe.task.inputs(batch).items()} for batch in samples]

    singles, batches = inputs(1, 8), inputs(THROUGHPUT_BATCH, 4)
    work = {name: sum(macs(model, one) for one in singles) // len(singles) for name, model in models.items()}
    if not recipe.measure.repeats:
        return {name: {"latency_ms": None, "throughput": None, "macs": work[name]} for name in models}
    timed = speeds(models, singles, batches, recipe.measure.repeats)
    return {name: {**timed[name], "macs": work[name]} for name in models}


def write(folder: Path, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """metrics.json (whole or not at all) and the report."""
    write_report(folder, metrics, config)
    partial = folder / "metrics.json.partial"
    partial.write_text(json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.rename(folder / "metrics.json")


def clean(value: Any) -> Any:
    """`value` with null where a number is not finite."""
    if isinstance(value, Mapping):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
