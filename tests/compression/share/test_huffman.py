"""Huffman codes and relative positions, against trees and tables worked out by hand and against real bit strings."""

from __future__ import annotations

import pytest
import torch

from niwaki.compression.share.huffman import GAP_BITS, code_lengths, coded_bytes, relative, shared_bytes


def test_a_tree_by_hand() -> None:
    # 5 + 9 = 14, 12 + 13 = 25, 14 + 16 = 30, 25 + 30 = 55, 45 + 55 = 100: depths 4 4 3 3 3 1
    frequencies = [5, 9, 12, 13, 16, 45]
    assert code_lengths(frequencies) == [4, 4, 3, 3, 3, 1]
    symbols = torch.cat([torch.full((n,), k) for k, n in enumerate(frequencies)])
    assert coded_bytes(symbols, 6) == 224 // 8 + 6


def test_trees_of_few_symbols() -> None:
    assert code_lengths([0, 7, 0]) == [0, 1, 0]
    assert code_lengths([0, 0]) == [0, 0]
    assert code_lengths([1, 0, 1]) == [1, 0, 1]
    assert code_lengths([1, 1, 1, 1]) == [2, 2, 2, 2]
    assert coded_bytes(torch.zeros(9, dtype=torch.uint8), 4) == 2 + 4


@pytest.mark.parametrize("seed", range(5))
def test_lengths_are_those_of_a_complete_prefix_code_no_longer_than_any(seed: int) -> None:
    frequencies = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = code_lengths(frequencies)
    present = [(f, n) for f, n in zip(frequencies, lengths, strict=True) if f]
    assert sum(2.0**-n for _, n in present) == 1  # Kraft
    total = sum(frequencies)
    entropy = -sum(f * float(torch.tensor(f / total).log2()) for f, _ in present)
    assert entropy - 1e-3 <= sum(f * n for f, n in present) < entropy + total


def test_the_relative_positions_of_the_papers_figure() -> None:
    # figure 2: values at 1, 4 and 15, 3 bits; a zero is stored at 12, 8 behind 4
    kept = torch.zeros(16, dtype=torch.bool)
    kept[[1, 4, 15]] = True
    entries, filler = relative(kept, 3)
    assert (entries + 1).tolist() == [2, 3, 8, 3]
    assert filler.tolist() == [False, False, True, False]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.7, 1.0])
def test_relative_positions_lead_back_to_the_mask(density: float) -> None:
    kept = torch.rand(40, 100) < density
    entries, filler = relative(kept)
    assert len(entries) == 0 or (int(entries.min()) >= 0 and int(entries.max()) < 2**GAP_BITS)
    places = (entries + 1).cumsum(0) - 1
    found = torch.zeros(4000, dtype=torch.bool)
    found[places[~filler]] = True
    assert torch.equal(found.view(40, 100), kept)
    assert not kept.flatten()[places[filler]].any()


def test_the_bytes_of_a_sparse_layer_by_hand() -> None:
    # kept at 0, 1, 40 of 64: distances 1, 1, 39 = a filler of 32 and 7; entries 0 0 31 6, symbols 2 1 filler 2
    kept = torch.zeros(8, 8, dtype=torch.bool)
    kept.view(-1)[[0, 1, 40]] = True
    indices = torch.zeros(8, 8, dtype=torch.uint8)
    indices.view(-1)[[0, 1, 40]] = torch.tensor([2, 1, 2], dtype=torch.uint8)
    # both streams: three symbols, twice, once and once: 1 + 1 + 2 + 2 = 6 bits, 1 byte; tables of 5 and of 32 lengths
    assert shared_bytes(indices, kept, 2) == (1 + 5) + (1 + 32)
    # dense: 61 zeros of 1 bit, two and one of 2 bits
    assert shared_bytes(indices, None, 2) == -(-(61 + 2 * 2 + 2) // 8) + 4
