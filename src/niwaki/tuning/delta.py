"""PEFT's additive adapters as the first link of the weight chain.

PEFT computes y = W x + delta(x) beside the base layer. Where something follows the delta (a mask, an integer grid)
that is another function than what a merge would leave, so the delta becomes a link, w -> w + delta, and PEFT's own
forward is told that the adapter is merged already: it then only calls its base layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from niwaki.stage import Phase
from niwaki.weights import Link, replace_module, stack

ADAPTER = "default"


class Delta(Link):
    """w -> w + delta, with PEFT's `get_delta_weight`. Runs in full precision: a fold has no autocast either."""

    phase = Phase.TUNE

    def __init__(self, layer: BaseTunerLayer) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: a registered child would make a cycle

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            layer: Any = self._layer[0]
            return weight + layer.get_delta_weight(ADAPTER)


def inject(model: nn.Module, config: PeftConfig) -> None:
    """Put adapters on the linears that `config.target_modules` names, and freeze all other parameters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Already found a `peft_config`.*")
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name or name.endswith(f".{ADAPTER}"))


def adapters(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Every adapter layer of the model, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def link(model: nn.Module, targets: Mapping[str, nn.Linear]) -> None:
    """Move the delta of every adapter whose base layer is a target into its weight chain."""
    chained = {id(linear) for linear in targets.values()}
    for _, layer in adapters(model):
        base = layer.get_base_layer()
        if id(base) in chained and not parametrize.is_parametrized(base, "weight"):
            stack(base, Delta(layer))  # type: ignore[arg-type]
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
