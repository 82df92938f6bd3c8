"""What is stored of shared weights: to the bit, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.quantize.integers import IntegerLinear, UseIntegers, to_codes
from niwaki.compression.share.stored import CodebookLinear, UseCodebook, look_up
from niwaki.measure.size import count
from niwaki.packing import pack, unpack
from niwaki.weights import packed, to_dense


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_a_few_bits(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (1003,), dtype=torch.uint8)
    stream = pack(numbers, bits)
    assert stream.dtype is torch.uint8
    assert len(stream) == -(-1003 * bits // 8)
    assert torch.equal(unpack(stream, bits, 1003), numbers)
    written = "".join(f"{byte:08b}" for byte in stream.tolist())
    assert written[: 1003 * bits] == "".join(f"{number:0{bits}b}" for number in numbers.tolist())


def test_a_table_for_each_of_some_rows() -> None:
    centroids = torch.tensor([[0.0, 1.0], [10.0, 20.0]])
    indices = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]], dtype=torch.uint8)
    assert look_up(centroids, indices).tolist() == [[0.0, 1.0], [1.0, 1.0], [10.0, 10.0], [20.0, 10.0]]


def shared_linear(bits: int, rows: int | None, mask: Tensor | None) -> tuple[CodebookLinear, Tensor]:
    """A layer of 24 inputs and 12 outputs, and its weight."""
    indices = torch.randint(0, 2**bits, (12, 24), dtype=torch.uint8)
    centroids = torch.randn(12 // (rows or 12), 2**bits)
    bias = nn.Parameter(torch.randn(12))
    kept = None if mask is None else int(mask.sum())
    linear = CodebookLinear(24, 12, bits=bits, rows=rows, kept=kept, bias=bias)
    linear.store(indices, centroids, mask)
    weight = torch.empty(12, 24)
    for row in range(12):
        for column in range(24):
            kept_here = mask is None or bool(mask[row, column])
            table = row // (rows or 12)
            weight[row, column] = centroids[table, int(indices[row, column])] if kept_here else 0.0
    return linear, weight


@pytest.mark.parametrize("density", [None, 0.0, 0.1, 1.0])
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_the_weight_comes_back_and_the_bytes_are_few(bits: int, rows: int | None, density: float | None) -> None:
    mask = None if density is None else torch.rand(12, 24) < density
    linear, weight = shared_linear(bits, rows, mask)
    assert torch.equal(linear.dequantized(), weight)
    values = torch.randn(5, 3, 24)
    assert torch.equal(linear(values), functional.linear(values, weight, linear.bias))
    stored = 288 if mask is None else int(mask.sum())
    sizes = {name: buffer.numel() * buffer.element_size() for name, buffer in linear.named_buffers()}
    assert sizes["indices"] == -(-stored * bits // 8)
    assert sizes["centroids"] == 4 * 2**bits * (12 // (rows or 12))
    assert sizes.get("mask") == (None if mask is None else 36)


def test_new_weights_replace_the_one_that_was_kept() -> None:
    (one, _), (other, weight) = (shared_linear(3, None, None) for _ in range(2))
    values = torch.randn(2, 24)
    one(values)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(values), functional.linear(values, weight, one.bias))
    assert one.to(torch.bfloat16)(values.bfloat16()).dtype is torch.bfloat16


def test_a_gradient_passes_after_a_first_use_in_inference_mode() -> None:
    linear, weight = shared_linear(2, None, None)
    values = torch.randn(4, 24)
    with torch.inference_mode():
        linear(values)
    linear(values.requires_grad_()).sum().backward()
    assert torch.allclose(values.grad, weight.sum(0).expand(4, 24), atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_edit_makes_empty_layers_of_the_right_shape(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 8, bias=False))
    UseCodebook(modules={"0": None, "1": 5}, bits=3, rows=None).apply(model)
    dense, sparse = model
    assert dense.indices.shape == (24,)
    assert dense.bias.device.type == device
    assert (sparse.indices.shape, sparse.mask.shape) == ((2,), (4,))
    assert all(buffer.device.type == device for buffer in model.buffers())


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("density", [None, 0.3])
def test_integers_above_take_their_codes_from_the_shared_values(density: float | None, group: int | None) -> None:
    mask = None if density is None else torch.rand(12, 24) < density
    linear, weight = shared_linear(4, None, mask)
    model = nn.Sequential(linear)
    held = sum(buffer.numel() * buffer.element_size() for buffer in linear.buffers())
    UseIntegers(modules=["0"], bits=8, group=group, activation_bits=8).apply(model)
    integer: Any = model[0]
    codes, scale = to_codes(weight.reshape(-1, group or 24), 8)
    integer.store(codes.to(torch.int8).view(12, 24), scale.view(12, -1))
    assert isinstance(integer, IntegerLinear)
    assert torch.equal(integer.dequantized(), (codes * scale).view(12, 24))
    plain = IntegerLinear(24, 12, bits=8, group=group, activation_bits=8, bias=integer.bias)
    plain.store(codes.to(torch.int8).view(12, 24), scale.view(12, -1))
    values = torch.randn(7, 24)
    assert torch.equal(integer(values), plain(values))
    names = set(model.state_dict())
    assert names >= {"0.bias", "0.scale", "0.shared.indices", "0.shared.centroids"}
    assert "0.codes" not in names
    assert sum(b.numel() * b.element_size() for b in model.buffers()) == held + 4 * integer.scale.numel()
    assert [name for name, _ in packed(model)] == ["0"]
    assert count(model)["parameters"] == 288 + 12
    to_dense(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, (codes * scale).view(12, 24))
