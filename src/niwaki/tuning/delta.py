"""PEFT's adapters as the first link of the weight chain.

PEFT computes its part beside the base layer, y = W x + delta(x) for most. Where something follows (a mask, an integer
grid) that is another function than what a merge would leave, so the merge becomes a link, w -> merged(w), and PEFT's
own forward is told that the adapter is merged already: it then only calls its base layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from niwaki.stage import Phase
from niwaki.tuning.peft_tuning import ADAPTER
from niwaki.weights import Link, replace_module, stack

Merge = Callable[[Any, Tensor], Tensor]
"""(adapter layer, base weight) -> merged weight, both (out, in)."""


def plus_delta(layer: Any, weight: Tensor) -> Tensor:
    """w + delta: the merge of every additive adapter."""
    merged: Tensor = weight + layer.get_delta_weight(ADAPTER)
    return merged


class Delta(Link):
    """w -> merged(w) with one adapter layer. Runs in full precision: a fold has no autocast either."""

    phase = Phase.TUNE

    def __init__(self, layer: BaseTunerLayer, merged: Merge = plus_delta) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: a registered child would make a cycle
        self._merged = merged

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return self._merged(self._layer[0], weight)


def inject(model: nn.Module, config: PeftConfig) -> BaseTuner:
    """Put adapters on the linears that `config.target_modules` names, and freeze all other parameters. Returns
    PEFT's tuner, which only some methods have a use for."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Already found a `peft_config`.*")
        return tuner(model, config, adapter_name=ADAPTER)


def adapters(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every adapter layer of the model, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def link(model: nn.Module, targets: Mapping[str, nn.Linear], merged: Merge = plus_delta) -> None:
    """Move the merge of every adapter whose base layer is a target into its weight chain."""
    chained = {id(linear) for linear in targets.values()}
    for _, layer in adapters(model):
        base = layer.get_base_layer()
        if id(base) in chained and not parametrize.is_parametrized(base, "weight"):
            stack(base, Delta(layer, merged))
            layer.merged_adapters = [ADAPTER]


def unload(model: nn.Module) -> None:
    """Merge what is not in its weight yet, and put the base layers back where the adapters stood."""
    for name, layer in list(adapters(model)):
        if not layer.merged:
            layer.merge(safe_merge=True)
        layer.merged_adapters = []
        replace_module(model, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
