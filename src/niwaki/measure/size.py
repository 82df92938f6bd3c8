"""What a model holds: parameters, non-zero ones, sparsity and bits of each compressed linear, multiply-adds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.weights import Packed, packed


def unique(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each tensor, tied ones once."""
    seen: set[int] = set()
    for tensor in tensors:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield tensor


def values(model: nn.Module) -> Iterator[Tensor]:
    """Every weight and bias once: tied tensors count once, codes as the weights that they are, scales not at all."""
    yield from unique(p.detach() for p in model.parameters())
    for _, module in packed(model):
        yield module.dequantized()


def count(model: nn.Module) -> dict[str, int]:
    """`parameters` and `nonzero`, over unique storage. Sparsity is 1 - nonzero / parameters."""
    parameters = nonzero = 0
    for tensor in values(model):
        parameters += tensor.numel()
        nonzero += int(torch.count_nonzero(tensor))
    return {"parameters": parameters, "nonzero": nonzero}


def held_bytes(model: nn.Module) -> int:
    """Bytes that the parameters and buffers of a model take up in memory, tied ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in unique([*model.parameters(), *model.buffers()]))


def target_table(model: nn.Module, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Of each named linear: parameters, sparsity (fraction of zeros), and bits of a stored weight."""
    table: dict[str, dict[str, float]] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        module = getattr(module, "base_layer", module)  # below an adapter
        is_packed = isinstance(module, Packed)
        weight: Any = module.dequantized() if is_packed else module.weight.detach()
        table[name] = {
            "parameters": weight.numel(),
            "sparsity": 1 - int(torch.count_nonzero(weight)) / weight.numel(),
            "bits": module.bits if is_packed else weight.element_size() * 8,
        }
    return table


def macs(model: Any, inputs: dict[str, Tensor]) -> int:
    """Multiply-adds of one forward pass on `inputs`; a masked zero is still multiplied, and counts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def integer_product(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._int_mm: integer_product})
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops() // 2


def peak_memory_mb() -> float:
    """Highest memory in MB: of the GPU since its statistics were last reset, where one was used, else the resident
    memory of this process since it began, imports and data included."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
