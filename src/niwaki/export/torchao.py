"""Packed linears as tensors of torchao, which transformers reads: our own codes and scales, none is drawn anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.tables import IntegerTable
from niwaki.export.export import ExportError
from niwaki.weights import Packed, packed

if TYPE_CHECKING:
    from niwaki.artifact import Artifact


def linears(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """The packed linears of a model, by name; embeddings go out dense."""
    return ((name, module) for name, module in packed(model) if not isinstance(module, IntegerTable))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """By the name of its weight, what torchao holds of each packed linear.

    Raises:
        ExportError: there is none, or torchao has no tensor for one.
    """
    made = {f"{name}.weight": tensor(module, name) for name, module in linears(model)}
    if not made:
        raise ExportError("weights=torchao: no linear is on a grid of integers; leave it dense")
    return made


def tensor(module: Packed, name: str) -> Tensor:
    """The codes of a linear, a byte each, with its scales and zeros. Inputs are not rounded: torchao would draw scales
    of its own from them, and multiply by a kernel that CPUs without VNNI clip.

    Raises:
        ExportError: torchao has no tensor for it.
    """
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    if not isinstance(module, IntegerLinear):
        raise ExportError(f"weights=torchao: {name} holds {module.holds}, and torchao integers; leave it dense")
    if module.dense is not nn.Linear:
        raise ExportError(f"weights=torchao: {name} is no nn.Linear in transformers; leave it dense")
    codes, scale = module.integers().contiguous(), module.scale.float()
    block = [1, module.group or module.in_features]
    if module.zero is None:
        made: Tensor = Int8Tensor(codes, scale, block, torch.float32, act_pre_scale=module.factor)
        return made
    if module.factor is not None:
        raise ExportError(
            f"weights=torchao: {name} has zeros and a factor for each input, and no tensor of torchao both; leave it "
            "dense, or compress with symmetric=true"
        )
    kind = getattr(torch, f"int{module.bits}")
    made = IntxUnpackedToInt8Tensor(codes, scale, module.zero, kind, tuple(block), torch.float32, None)
    return made


def card(model: nn.Module) -> Any:
    """What config.json says of the weights: how torchao would make such ones. They are read as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, PerRow
    from transformers import TorchAoConfig

    first: Any = next(linears(model))[1]
    if first.zero is None:
        return TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(first.group) if first.group else PerRow()))
    granularity = PerGroup(first.group) if first.group else PerAxis(0)
    return TorchAoConfig(IntxWeightOnlyConfig(getattr(torch, f"int{first.bits}"), granularity))


def write(saved: Artifact, folder: Path) -> None:
    """Write the model of an artifact, its settings and its tokenizer; what is on no grid stays dense.

    Raises:
        ArtifactError: transformers builds no such model.
        ExportError: torchao has no tensor for a linear.
    """
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    from niwaki import artifact, plain

    made, described = tensors(saved.model), card(saved.model)
    merged = artifact.merge(saved)
    plain.refuse_foreign(merged, "")
    state = {name: made.get(name, tensor) for name, tensor in artifact.unique_tensors(merged.model).items()}
    assert made.keys() <= state.keys()
    stored, metadata = flatten_tensor_state_dict(state)
    whole = {name: one.contiguous() for name, one in stored.items()}
    save_file(whole, folder / artifact.WEIGHTS, {**metadata, "format": "pt"})
    merged.model.config.quantization_config = described
    artifact.save_settings(merged.model, merged.tokenizer, folder)
