"""Learning rates that differ by the part of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.depth import depths, height, norm_parameters, prompt_parameters

PARTS = ("head", "blocks", "embeddings", "norms", "prompt")


def check_rates(layer_decay: float, lr_by_part: Mapping[str, float] | None) -> None:
    """Raise ConfigError for a decay that is none, an unknown part or a rate that is none."""
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay={layer_decay}: needs a number above 0, up to 1 (no decay)")
    for part, rate in (lr_by_part or {}).items():
        if part not in PARTS:
            raise ConfigError(f"optimizer.lr_by_part.{part}: no such part; needs some of {', '.join(PARTS)}")
        if not 0 < rate < math.inf:
            raise ConfigError(f"optimizer.lr_by_part.{part}={rate}: needs a number above 0")


def rates(
    model: Any, lr: float, layer_decay: float = 1.0, lr_by_part: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The learning rate of each parameter that learns, by its name.

    A part in `lr_by_part` has that very rate. The others have lr * layer_decay^(d - 1) at depth d: `lr` above the
    blocks and in the top block, lr * layer_decay^L in the embeddings below L blocks.

    Raises:
        ConfigError: nothing of a part learns, or a decay changes the rate of nothing.
    """
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if layer_decay == 1 and not lr_by_part:
        return dict.fromkeys(learning, lr)
    anatomy, given = Anatomy.of(model), lr_by_part or {}
    depth = depths(anatomy)
    parts = parts_of(anatomy, depth)
    own = {name: next((part for part in parts[name] if part in given), "") for name in learning}
    for part in given:
        if part not in own.values():
            raise ConfigError(f"optimizer.lr_by_part.{part}={given[part]}: nothing of this part learns; leave it out")
    decayed = {name: lr * layer_decay ** max(depth[name] - 1, 0) for name in learning if not own[name]}
    if layer_decay < 1 and all(rate == lr for rate in decayed.values()):
        raise ConfigError(
            f"optimizer.layer_decay={layer_decay}: has no effect; nothing else learns below the top block; leave it 1"
        )
    return {name: given[own[name]] if own[name] else decayed[name] for name in learning}


def parts_of(anatomy: Anatomy, depth: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """The parts that each parameter belongs to, the closest first: norms, then where it stands. What is put before the
    text (virtual tokens, prefixes) is a part of its own, wherever it stands."""
    norms, prompt, lowest = norm_parameters(anatomy.model), prompt_parameters(anatomy.model), height(anatomy)
    places = {name: "head" if not d else "blocks" if d <= lowest else "embeddings" for name, d in depth.items()}
    places |= dict.fromkeys(prompt, "prompt")
    return {name: ("norms", place) if name in norms else (place,) for name, place in places.items()}
