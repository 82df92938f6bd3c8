"""Artifacts of tiny models, for the tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from niwaki import artifact
from niwaki.model.anatomy import adapt
from niwaki.stage import Phase
from niwaki.weights import fold


def saved(one: Any, folder: Path, *stages: Any, tuning: Any = None) -> artifact.Artifact:
    """The artifact of a model after these stages, without a fit; what a tuning adds is moved away from nothing."""
    base_config, edits = one.model.config.to_dict(), adapt(one.model)
    context = one.context()
    shaping = [stage for stage in stages if stage.phase <= Phase.SHAPE]
    for stage in shaping:
        edits += stage.prepare(one.model, context).edits
    if tuning:
        edits += tuning.grow(one.model, context.anatomy)
    context = one.context()
    if tuning:
        edits += tuning.prepare(one.model, context).edits
        for name, parameter in one.model.named_parameters():
            if any(part in name for part in (".lora_B.", ".prefix.", ".up.")):
                torch.nn.init.normal_(parameter, std=0.1)
    for stage in stages:
        if stage not in shaping:
            edits += stage.prepare(one.model, context).edits
    context.records.update(fold(context.targets))
    for stage in [*([tuning] if tuning else []), *stages]:
        edits += stage.finalize(one.model, context)
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits, store="auto",
    )  # fmt: skip
    return artifact.load(folder)
