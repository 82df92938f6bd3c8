"""Whole numbers of a few bits each, as one stream of bytes with nothing between them."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers from 0 to 2^bits - 1 as a stream of `bits` each, the highest bit first. uint8, ceil(n * bits / 8)."""
    if bits == 8:
        return numbers.flatten().to(torch.uint8).cpu().contiguous()
    planes = numpy.unpackbits(numbers.flatten().to(torch.uint8).cpu().numpy()[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(numpy.packbits(planes.ravel()))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers that `pack` was given, uint8."""
    if bits == 8:
        return packed[:count]
    planes = numpy.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    padded = numpy.zeros((count, 8), dtype=numpy.uint8)
    padded[:, 8 - bits :] = planes
    return torch.from_numpy(numpy.packbits(padded, axis=1).ravel()).to(packed.device)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a stream of `count` numbers."""
    return -(-count * bits // 8)
