"""`niwaki export`: an artifact that is there already, in another format, judged as in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from niwaki import artifact, catalogue
from niwaki.data.corpus import Corpus
from niwaki.data.source import Source
from niwaki.errors import ConfigError
from niwaki.export.export import Export
from niwaki.export.exports import Rows, export
from niwaki.inference import WholeFile, check_labels, find_artifact
from niwaki.measure.evaluate import evaluate
from niwaki.model.anatomy import Anatomy


def export_command(
    place: Path, file: Path | None, columns: Mapping[str, str], to: str, settings: Sequence[str], output: Path,
    repeats: int, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Write `output`, which must not be there yet; what was measured.

    Raises:
        UserError: no artifact, no rows, a format or setting that there is not, or an export that is not good.
    """
    one = chosen(to, settings)
    if output.exists():
        raise ConfigError(f"--output {output}: exists already; name a folder that does not")
    folder = find_artifact(place)
    saved = artifact.load(folder)
    one.check(saved.task, Anatomy.of(artifact.load_merged(folder).model))
    corpus = rows_of(place, file, columns, saved, batch_size)
    scores = evaluate(saved.model, corpus.evaluation("test"), saved.task, saved.labels, saved.tokenizer).compute()
    return export(one, folder, output, Rows(corpus, scores, repeats))


def chosen(to: str, settings: Sequence[str]) -> Export:
    """The export of that name, with `setting=value` in place of its defaults.

    Raises:
        ConfigError: there is no such export or setting, or it does not have such values.
    """
    from niwaki import compose
    from niwaki.allow import resolve

    known = [one.name for one in catalogue.options("export")]
    if to not in known:
        raise ConfigError(f"--to {to}: no such export{compose.suggestion(to, known)}")
    node = catalogue.read_yaml(catalogue.config_folder() / "export" / f"{to}.yaml")
    for setting in settings:
        name, equal, value = setting.partition("=")
        if not equal:
            raise ConfigError(f"--set {setting}: needs SETTING=VALUE")
        try:
            node[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: {value} is no value ({error.args[0] or 'YAML'})") from error
    compose.check_settings(f"export.{to}", node)
    kind: Any = resolve(node.pop("_target_"), (Export,))
    found: Export = kind(**node)
    return found


def rows_of(
    place: Path, file: Path | None, columns: Mapping[str, str], saved: artifact.Artifact, batch_size: int
) -> Corpus:
    """The rows of a labelled file, or the test rows of a run, encoded as the artifact reads them."""
    from datasets import Dataset

    needs = saved.task.needs.trained_on(saved.columns)
    if file is not None:
        source: Source = WholeFile(train=str(file), columns=columns, eval_batch_size=batch_size)
        assert isinstance(source, WholeFile)
        rows, origin, seed = source.rows(needs), str(file), 0
    elif (place / "config.yaml").is_file():
        if columns:
            raise ConfigError("--column: names a column of a file; give one")
        from niwaki import compose

        recipe = compose.build(yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")))
        source, seed, origin = dataclasses.replace(recipe.data, eval_batch_size=batch_size), recipe.seed, str(place)
        rows = source.splits(needs, seed)["test"]
    else:
        raise ConfigError(
            f"export {place}: needs a file with labelled rows, or the folder of a run, whose test rows it takes then"
        )
    check_labels(rows, saved.labels, origin, saved.task)
    features = Dataset.from_dict(saved.task.encode(rows[:], saved.tokenizer, saved.labels))
    return Corpus(saved.task, source, saved.tokenizer, saved.labels, {"test": features}, seed)
