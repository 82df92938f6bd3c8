"""Several adapters on one base: an artifact with another adapter than its own, or with none."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from niwaki import artifact
from niwaki.artifact import Artifact
from niwaki.errors import ArtifactError
from niwaki.naming import is_plain
from niwaki.tuning import beside
from niwaki.tuning.beside import UseAdapter

NONE = "none"


def load_with(folder: Path, adapter: str) -> Artifact:
    """The artifact of `folder` with the adapter that `adapter` means: a name of one in it, the folder of a run or of
    an artifact with an adapter of its own, the folder of an adapter (PEFT's, or of bottlenecks), or `none`.

    Raises:
        ArtifactError: there is no such adapter, or it was made for another base, task or labels.
    """
    card = artifact.parse_card(folder)  # `load` looks at the files
    own = uses(card)
    if adapter == NONE:
        if not own:
            raise ArtifactError(f"--adapter none: the artifact {folder} has no adapter, all is in its weights")
        return artifact.load(folder, base_alone=True)
    place, home = located(folder, card, adapter)
    theirs = artifact.read_card(home) if home else card
    refuse_another_task(place, theirs, card)
    alone = artifact.load(folder, base_alone=True)
    if home and uses(theirs):
        refuse_another_base(place, home, uses(theirs)[0], alone.model)
    beside.put_on(alone.model, place)
    return replace(alone, model=alone.model.eval())


def uses(card: dict[str, Any]) -> list[UseAdapter]:
    """The adapter of an artifact's own, where it has one."""
    from niwaki.edits import from_json

    return [edit for edit in map(from_json, card["edits"]) if isinstance(edit, UseAdapter)]


def located(folder: Path, card: dict[str, Any], adapter: str) -> tuple[Path, Path | None]:
    """The folder of an adapter, and that of the other artifact which it is part of, if any."""
    if f"{adapter}/{beside.CONFIG}" in card["files"]:
        return folder / adapter, None
    place = Path(adapter).expanduser()
    if (place / beside.CONFIG).is_file():
        return place, place.parent if artifact.is_artifact(place.parent) else None
    home = next((home for home in (place, place / "model") if artifact.is_artifact(home)), None)
    if home is None:
        names = sorted(name.partition("/")[0] for name in card["files"] if name.endswith(f"/{beside.CONFIG}"))
        known = f"; the artifact holds {', '.join(names)}" if names else ""
        raise ArtifactError(f"--adapter {adapter}: no such adapter, nor a folder with {beside.CONFIG}{known}")
    own = uses(artifact.parse_card(home))
    if not own:
        raise ArtifactError(f"--adapter {adapter}: all is in its weights; needs a run with tuning.merge=false")
    return home / own[0].folder, home


def refuse_another_task(place: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ArtifactError unless both cards name the same task and the same labels."""
    if theirs["task"] != ours["task"]:
        names = [artifact.task_of(card).name for card in (theirs, ours)]
        raise ArtifactError(f"adapter {place}: does the task {names[0]}, the base {names[1]}")
    if theirs["labels"] != ours["labels"]:
        odd = sorted(set(theirs["labels"]) ^ set(ours["labels"])) or ["their order"]
        raise ArtifactError(f"adapter {place}: its labels are not those of the artifact ({', '.join(odd[:3])})")


def refuse_another_base(place: Path, home: Path, own: UseAdapter, model: Any) -> None:
    """Raise ArtifactError unless `model` has the very weights of the base in `home`, whose own adapter is `own`."""
    heads = beside.learned_beside(home / own.folder)
    if beside.fingerprint(beside.base_state(model, model.state_dict()), heads) != own.base:
        raise ArtifactError(f"adapter {place}: was trained on another base; the weights of this one are not the same")


def add(folder: Path, adapter: str, name: str) -> Path:
    """Copy an adapter that `load_with` takes into the artifact, under `name`.

    Raises:
        ArtifactError: the name is no plain one, or is taken.
    """
    card = artifact.read_card(folder)
    if name == NONE or not is_plain(name):
        raise ArtifactError(f"add-adapter {name!r}: needs a plain name")
    if (folder / name).exists():
        raise ArtifactError(f"add-adapter {name}: the artifact has a file or an adapter of that name already")
    load_with(folder, adapter)
    place, _ = located(folder, card, adapter)
    (folder / name).mkdir()
    try:
        for file in (beside.CONFIG, beside.WEIGHTS):
            path = Path(shutil.copyfile(place / file, folder / name / file))
            card["files"][f"{name}/{file}"] = artifact.stamp(path)
        text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        (folder / name / artifact.CARD).write_text(text, encoding="utf-8")
        (folder / name / artifact.CARD).replace(folder / artifact.CARD)
    except BaseException:
        shutil.rmtree(folder / name, ignore_errors=True)
        raise
    return folder / name
