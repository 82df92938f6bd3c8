"""`niwaki sensitivity`: measures an artifact on labelled rows and writes table, picture and map of sparsities."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from niwaki import artifact
from niwaki.data.corpus import Corpus
from niwaki.data.source import Source
from niwaki.errors import ArtifactError, ConfigError
from niwaki.inference import WholeFile, check_labels, find_artifact
from niwaki.measure import sensitivity
from niwaki.measure.evaluate import evaluate
from niwaki.measure.report import markdown_table, number
from niwaki.measure.sensitivity import MEASURED, Plan, Record, replace_file

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = ("sensitivity.json", "sensitivity.md", "sensitivity.png")


@dataclass(frozen=True)
class Probe:
    """A model with dense weights, and the rows on which it is measured."""

    saved: artifact.Artifact
    corpus: Corpus
    origin: str

    @property
    def metric(self) -> str:
        return self.saved.task.metric

    @property
    def rows(self) -> int:
        return len(self.corpus.features["test"])

    def scorer(self) -> Callable[[], float]:
        """The task's metric of the model as it is at the time of the call."""
        saved, batches = self.saved, list(self.corpus.evaluation("test"))
        given = (saved.task, saved.labels, saved.tokenizer)
        return lambda: evaluate(saved.model, batches, *given, watched=True).compute()[self.metric]


def sensitivity_command(
    place: Path, file: Path | None, columns: Mapping[str, str], plan: Plan, limit: int | None, output: Path | None,
    batch_size: int,
) -> Path:  # fmt: skip
    """Measure, and write everything to a folder; what an earlier call measured there is taken over.

    Raises:
        UserError: no artifact, no labelled rows, or a folder that cannot be used.
    """
    folder = find_artifact(place)
    output = folder.parent / "sensitivity" if output is None else output
    if folder.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"--output {output}: is in the artifact, whose files are counted; name another folder")
    probe = prepare(folder, rows_of(place, file, columns, limit, batch_size))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror})") from error
    write(output, *measured(probe, plan, output))
    return output


def rows_of(
    place: Path, file: Path | None, columns: Mapping[str, str], limit: int | None, batch_size: int
) -> tuple[Source, str, int]:
    """Where labelled rows come from: all of a file, or the validation rows of a run; with the seed that draws them."""
    if file is not None:
        source = WholeFile(train=str(file), columns=columns, limit=limit, eval_batch_size=batch_size)
        return source, str(file), 0
    if columns:
        raise ConfigError("--column: names a column of a file; give one")
    if not (place / "config.yaml").is_file():
        raise ConfigError(
            f"sensitivity {place}: needs a file with labelled rows, or the folder of a run, whose validation rows it "
            "takes then"
        )
    from niwaki import compose

    recipe = compose.build(yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")))
    known = [one for one in (limit, recipe.data.limit) if one is not None]
    limited = replace(recipe.data, limit=min(known, default=None), shots=None, eval_batch_size=batch_size)
    return limited, f"validation rows of {place}", recipe.seed


def prepare(folder: Path, rows: tuple[Source, str, int]) -> Probe:
    """The artifact with dense weights, adapters merged, and its rows encoded."""
    from datasets import Dataset

    source, origin, seed = rows
    saved = artifact.load_merged(folder)
    found: Dataset = labelled(saved, source, seed)
    check_labels(found, saved.labels, origin, saved.task)
    features = Dataset.from_dict(saved.task.encode(found[:], saved.tokenizer, saved.labels))
    saved.model.requires_grad_(False)
    return Probe(saved, Corpus(saved.task, source, saved.tokenizer, saved.labels, {"test": features}, seed=0), origin)


def labelled(saved: artifact.Artifact, source: Source, seed: int) -> Dataset:
    """The rows under the task's names."""
    needs = saved.task.needs.trained_on(saved.columns)
    return source.rows(needs) if isinstance(source, WholeFile) else source.splits(needs, seed)["validation"]


def measured(probe: Probe, plan: Plan, output: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Everything that is known of the model, and the map where a target is given."""
    saved, score, path = probe.saved, probe.scorer(), output / MEASURED
    groups = sensitivity.units(saved.model, plan.unit)
    if not groups:
        raise ArtifactError(f"artifact {saved.folder}: has no linears that could be pruned")
    identity = sensitivity.identity_of(saved.folder, probe.corpus.features["test"])
    record = Record.read(path, identity) or Record(identity, score())
    sensitivity.measure(saved.model, groups, plan.sparsities, score, record, path, tell)
    sizes = {name: saved.model.get_submodule(name).weight.numel() for names in groups.values() for name in names}
    facts = {
        "schema": 1, "task": saved.task.name, "metric": probe.metric, "mode": saved.task.mode, "rows": probe.rows,
        "row": saved.task.unit.removesuffix("s"),
        "origin": probe.origin, "score": "magnitude", "unit": plan.unit, "sparsities": list(plan.sparsities),
        "base": record.base, "units": {
            unit: {
                "linears": names, "parameters": sum(sizes[name] for name in names),
                "scores": {f"{s}": record.scores[unit][f"{s}"] for s in plan.sparsities},
            }
            for unit, names in groups.items()
        },
        "places": sensitivity.places(saved.model),
    }  # fmt: skip
    return facts, mapped(probe, plan, record, groups, sizes, score) if plan.target else None


def mapped(
    probe: Probe, plan: Plan, record: Record, groups: Mapping[str, Sequence[str]], sizes: Mapping[str, int],
    score: Callable[[], float],
) -> dict[str, Any]:  # fmt: skip
    """The map for the target, and the metric with all linears pruned by it, beside the same sparsity everywhere."""
    assert plan.target is not None
    mode, model = probe.saved.task.mode, probe.saved.model
    curves = {
        unit: list(zip(plan.sparsities, sensitivity.losses(record, unit, plan.sparsities, mode), strict=True))
        for unit in groups
    }
    found = sensitivity.sparsity_map(groups, curves, sizes, plan.target)
    alike = sensitivity.whole_counts(dict.fromkeys(sizes, plan.target), sizes, plan.target)
    results = {}
    for name, sparsities in (("map", found), ("uniform", alike)):
        with sensitivity.pruned(model, sparsities):
            results[name] = score()
    removed = sum(found[name] * size for name, size in sizes.items())
    overall = removed / sum(sizes.values())
    return {"sparsity": found, "target": plan.target, "overall": overall, "metric": probe.metric, "scores": results}


def tell(line: str) -> None:
    """How far it is; the answer of the command is the folder alone."""
    print(line, file=sys.stderr, flush=True)


def write(output: Path, facts: Mapping[str, Any], found: Mapping[str, Any] | None) -> None:
    """Table, picture and numbers; each file whole or not at all."""
    from niwaki.measure.plots import draw_sensitivity

    picture = output / "sensitivity.partial.png"
    draw_sensitivity(facts, picture)
    picture.replace(output / "sensitivity.png")
    replace_file(output / "sensitivity.md", markdown(facts, found))
    if found is not None:
        from niwaki.measure.sides import clean

        replace_file(output / map_name(found["target"]), json.dumps(clean(found), indent=1) + "\n")
    replace_file(output / "sensitivity.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def map_name(target: float) -> str:
    """The file of the map for an overall sparsity."""
    return f"sparsity-{target:g}.json"


def markdown(facts: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    """The text of sensitivity.md."""
    metric, base = facts["metric"], facts["base"]
    header = [facts["unit"], "weights", *(f"{100 * s:g}%" for s in facts["sparsities"])]
    rows = [
        [f"`{unit}`", f"{known['parameters']:,}", *(change(one, base) for one in known["scores"].values())]
        for unit, known in facts["units"].items()
    ]
    what = (
        f"{metric} on {facts['rows']:,} {facts['row']}s ({facts['origin']}): "
        f"{number(metric, base)} as it is. Each number below is the change when that {facts['unit']} alone loses its "
        "smallest weights, without training; one measurement each, so changes of a few rows are noise."
    )
    parts = ["# Sensitivity", what, "![sensitivity](sensitivity.png)", markdown_table(header, rows)]
    return "\n\n".join([*parts, *([] if found is None else [map_text(found, facts)])]) + "\n"


def map_text(found: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What the map is, and how it did."""
    rows = [
        [name, number(facts["metric"], score), change(score, facts["base"])] for name, score in found["scores"].items()
    ]
    table = markdown_table(["sparsities", facts["metric"], "change"], rows)
    return (
        f"## {100 * found['target']:g}% in all\n\n`{map_name(found['target'])}` gives each linear its own sparsity, by "
        "the least sum of the changes above (lines between what was measured, gains taken for noise); 'uniform' is the "
        "same sparsity everywhere. Without training, on the rows that the map was drawn from, which favours it:"
        f"\n\n{table}\n\n"
        f"{'The map is better here.' if better(found, facts['mode']) else 'The map is no better than uniform here.'}"
    )


def better(found: Mapping[str, Any], mode: str) -> bool:
    """Whether the map did better than uniform sparsities."""
    scores = found["scores"]
    return bool(scores["map"] > scores["uniform"] if mode == "max" else scores["map"] < scores["uniform"])


def change(score: float | None, base: float) -> str:
    """The change of a metric, with its sign."""
    return "-" if score is None else f"{score - base:+.4f}"
