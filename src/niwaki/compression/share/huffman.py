"""The size of shared weights in a Huffman code (Huffman 1952), as Deep Compression counts it (Han et al. 2016,
arXiv:1510.00149, sections 2 and 4). Only counted: what an artifact holds is packed, which loads faster."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

GAP_BITS = 5  # of the distance from one kept weight to the next, as in the paper for fully connected layers


def code_lengths(frequencies: Sequence[int]) -> list[int]:
    """Bits of the codeword of each symbol, 0 for a symbol that never occurs; one that stands alone takes 1 bit."""
    present = [(count, symbol) for symbol, count in enumerate(frequencies) if count]
    heap: list[tuple[int, int, tuple[int, ...]]] = [(count, symbol, (symbol,)) for count, symbol in present]
    lengths = [0] * len(frequencies)
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (few, age, left), (more, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (few + more, age, left + right))
    return lengths


def coded_bytes(symbols: Tensor, alphabet: int) -> int:
    """Bytes of a stream of symbols from 0 to alphabet - 1 in the Huffman code of its own frequencies, with the length
    of each codeword in a byte, from which a decoder builds the (canonical) code."""
    frequencies = torch.bincount(symbols.flatten().long(), minlength=alphabet).tolist()
    bits = sum(f * length for f, length in zip(frequencies, code_lengths(frequencies), strict=True))
    return -(-bits // 8) + alphabet


def relative(kept: Tensor, bits: int = GAP_BITS) -> tuple[Tensor, Tensor]:
    """The distances between the kept elements of a flat mask, in their order, less 1: from 0 to 2^bits - 1. A distance
    that does not fit is parted by zeros that are stored like weights: the second tensor is True for these fillers.
    The first distance is from the place before the first element."""
    places = kept.flatten().nonzero()[:, 0]
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    fillers = gaps >> bits  # of each kept element, before it
    ends = (fillers + 1).cumsum(0) - 1
    filler = torch.ones(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.bool)
    filler[ends] = False
    entries = torch.full(filler.shape, 2**bits - 1)
    entries[ends] = gaps & (2**bits - 1)
    return entries, filler


def shared_bytes(indices: Tensor, kept: Tensor | None, bits: int) -> int:
    """Bytes of the indices (0 to 2^bits - 1) of a layer in a Huffman code; of those kept alone, with their distances
    in a Huffman code of their own, where some are not. Centroids come on top."""
    if kept is None:
        return coded_bytes(indices, 2**bits)
    gaps, filler = relative(kept.cpu())
    symbols = torch.full(filler.shape, 2**bits)  # a filler's own symbol
    symbols[~filler] = indices.cpu()[kept.cpu()].long()
    return coded_bytes(symbols, 2**bits + 1) + coded_bytes(gaps, 2**GAP_BITS)
