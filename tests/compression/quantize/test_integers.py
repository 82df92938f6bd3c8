"""Integer grids: codes and scales by hand, the file to the bit, the integer product in plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.compression.quantize.integers import (
    FixedGrid,
    IntegerGrid,
    IntegerLinear,
    RoundActivations,
    UseIntegers,
    input_codes,
    largest_code,
    pack,
    put_on_grid,
    to_codes,
    unpack,
)
from niwaki.compression.quantize.layout import Layout, values_of
from niwaki.edits import from_json
from niwaki.weights import fold, stack


def test_the_grid_is_symmetric() -> None:
    assert [largest_code(bits) for bits in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]


def test_codes_and_scales_by_hand() -> None:
    # 4 bits: q = 7; scales 7/7, 0.5 and (a row of zeros) 1
    weight = torch.tensor([[7.0, -3.4, 0.6, 0.0], [-3.5, 1.0, 0.7, -0.2], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = to_codes(weight, 4)
    assert codes.tolist() == [[7, -3, 1, 0], [-7, 2, 1, 0], [0, 0, 0, 0]]
    assert scale.tolist() == [[1.0], [0.5], [1.0]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_value_gets_the_largest_code_and_the_error_is_half_a_step(bits: int) -> None:
    weight = torch.randn(20, 33)
    codes, scale = to_codes(weight, bits)
    q = 2 ** (bits - 1) - 1
    assert torch.equal(codes.abs().amax(1), torch.full((20,), float(q)))
    assert torch.allclose(scale[:, 0], weight.abs().amax(1) / q, rtol=1e-6)
    assert bool(((codes * scale - weight).abs() <= scale / 2 * 1.0001).all())
    assert torch.equal(codes, codes.round())


def test_group_scales_by_hand() -> None:
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[3.0, 1.0, 30.0, 20.0], [0.0, 0.0, -0.3, 0.1]])
    grid = IntegerGrid(3, 2)
    record = grid.record(linear.weight.data)
    assert torch.allclose(record["scale"], torch.tensor([[1.0, 10.0], [1.0, 0.1]]))
    assert record["codes"].tolist() == [[3, 1, 3, 2], [0, 0, -3, 1]]
    assert torch.allclose(grid(linear.weight.data), torch.tensor([[3.0, 1.0, 30.0, 20.0], [0.0, 0.0, -0.3, 0.1]]))


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_is_a_fixed_point_and_zeros_stay_zeros(bits: int, group: int | None) -> None:
    weight = torch.randn(6, 32) * (torch.rand(6, 32) > 0.5)
    grid = IntegerGrid(bits, group)
    once = grid(weight)
    assert not once[weight == 0].any()
    assert torch.allclose(grid(once), once, rtol=1e-6, atol=0)
    assert all(len(row.unique()) <= 2**bits - 1 for row in once.reshape(-1, group or 32))


def test_the_gradient_passes_straight_through() -> None:
    linear = nn.Linear(4, 3, bias=False)
    stack(linear, IntegerGrid(2, None))
    values, pull = torch.randn(5, 4), torch.randn(5, 3)
    linear(values).backward(pull)
    assert torch.allclose(linear.parametrizations.weight.original.grad, pull.t() @ values, atol=1e-6)  # type: ignore[union-attr, arg-type]


def test_activations_are_rounded_per_token_by_hand() -> None:
    # 3 bits: q = 3; each token (last axis) has its own scale: 1 and 0.1
    values = torch.tensor([[[3.0, -1.4, 0.4], [0.3, 0.16, -0.04]]], requires_grad=True)
    (rounded,) = RoundActivations(3)(nn.Identity(), (values,))
    assert torch.allclose(rounded, torch.tensor([[[3.0, -1.0, 0.0], [0.3, 0.2, 0.0]]]))
    rounded.sum().backward()
    assert torch.equal(values.grad, torch.ones(1, 2, 3))  # type: ignore[arg-type]


def test_putting_on_a_grid_rounds_weights_and_inputs() -> None:
    linear, plain = nn.Linear(8, 3), nn.Linear(8, 3)
    plain.load_state_dict(linear.state_dict())
    put_on_grid({"it": linear}, 4, None, 5)
    values = torch.randn(2, 6, 8)
    weight = torch.stack([(row / (row.abs().max() / 7)).round() * (row.abs().max() / 7) for row in plain.weight])
    tokens = torch.stack([(t / (t.abs().max() / 15)).round() * (t.abs().max() / 15) for t in values.view(-1, 8)])
    expected = functional.linear(tokens.view(2, 6, 8), weight, plain.bias)
    assert torch.allclose(linear(values), expected, atol=1e-5)


def test_bits_in_the_stream_by_hand() -> None:
    # 3 bits, offset 3: codes -3 0 3 1 -> 000 011 110 100 -> 00001111 0100(0000)
    assert pack(torch.tensor([-3, 0, 3, 1], dtype=torch.int8), Layout(bits=3)).tolist() == [0b00001111, 0b01000000]
    # 4 bits, offset 7: -7 7 0 -> 0000 1110 0111
    assert pack(torch.tensor([-7, 7, 0], dtype=torch.int8), Layout(bits=4)).tolist() == [0b00001110, 0b01110000]
    # 2 bits with a zero, offset 2: -2 1 0 -> 00 11 10
    assert pack(torch.tensor([-2, 1, 0], dtype=torch.int8), Layout(bits=2, zero="whole")).tolist() == [0b00111000]
    # 1 bit: -1 1 1 -1 1 -> 0 1 1 0 1
    assert pack(torch.tensor([-1, 1, 1, -1, 1], dtype=torch.int8), Layout(bits=1)).tolist() == [0b01101000]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 13), (8, 16), (1, 9)])
@pytest.mark.parametrize("zero", ["none", "whole"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_and_unpack(bits: int, zero: Any, shape: tuple[int, int]) -> None:
    layout = Layout(bits=bits, zero=zero if bits > 1 else "none")
    step = 2 if bits == 1 else 1
    codes = torch.randint(0, layout.steps // step + 1, shape).mul(step).add(layout.lowest).to(torch.int8)
    codes.view(-1)[0] = layout.highest
    codes.view(-1)[-1] = layout.lowest
    packed = pack(codes, layout)
    assert (packed.dtype, len(packed)) == (torch.uint8, -(-shape[0] * shape[1] * bits // 8))
    assert torch.equal(unpack(packed, layout, shape), codes)


@pytest.mark.parametrize("zero", ["none", "whole", "real"])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_nearest_point_of_a_grid(bits: int, group: int | None, zero: Any) -> None:
    """By a search through all codes; a zero stays a zero where the grid has one; the ends are held."""
    layout = Layout(bits=bits, group=group, zero=zero)
    weight = torch.randn(5, 8) + 0.3
    weight[1, 2] = 0.0
    weight[2] = weight[2].abs()
    grouped = layout.grouped(weight)
    scale, offset = layout.grid_of(grouped)
    codes = layout.codes_of(grouped, scale, offset)
    every = torch.arange(layout.lowest, layout.highest + 1)
    points = values_of(every.expand(*grouped.shape[:2], -1), scale, offset)
    best = (grouped[..., None] - points[:, :, None]).abs().amin(-1)
    found = values_of(codes, scale, offset)
    assert torch.allclose((grouped - found).abs(), best, atol=1e-6)
    assert float((grouped - found).abs().div(scale).max()) <= 0.501 + (zero == "whole") * 0.5
    if zero != "real":
        assert float(found.view(5, 8)[1, 2]) == 0.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_whole_zero_is_one_of_the_codes(bits: int) -> None:
    """Even of weights of one sign, far from zero: a file has no more bits for it."""
    layout = Layout(bits=bits, zero="whole")
    for weight in (torch.rand(4, 16) + 5, -torch.rand(4, 16) - 5):
        _, zero = layout.grid_of(weight)
        assert zero is not None
        assert layout.lowest <= int(zero.min()) <= int(zero.max()) <= layout.highest


def test_an_asymmetric_grid_by_hand() -> None:
    # 2 bits, codes -2..1; values -1 .. 2: scale 1, zero = -2 + 1 = -1
    layout = Layout(bits=2, zero="whole")
    scale, zero = layout.grid_of(torch.tensor([[-1.0, 0.4, 2.0]]))
    assert zero is not None
    assert (scale.item(), zero.item()) == (1.0, -1.0)
    codes = layout.codes_of(torch.tensor([[-1.0, 0.4, 2.0]]), scale, zero)
    assert codes.tolist() == [[-2.0, -1.0, 1.0]]
    assert values_of(codes, scale, zero).tolist() == [[-1.0, 0.0, 2.0]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("zero", "group", "activation_bits", "factored", "one_scale"),
    [("whole", 8, None, False, False), ("real", None, None, True, False), ("none", None, 8, True, False),
     ("none", None, 8, False, True), ("none", 8, 8, True, True), ("whole", None, 8, True, True)],
)  # fmt: skip
def test_what_was_chosen_is_what_is_stored(
    bits: int, zero: Any, group: int | None, activation_bits: int | None, factored: bool, one_scale: bool
) -> None:
    """A fixed grid in a chain, folded, in integers and from a state dict: the same function."""
    layout, linear = Layout(bits=bits, group=group, zero=zero if bits > 1 else "none"), nn.Linear(24, 10)
    factor = torch.rand(24) + 0.5 if factored else None
    scale_in = torch.tensor(0.02) if one_scale else None
    weight = linear.weight.detach() / (1 if factor is None else factor)
    scale, offset = layout.grid_of(layout.grouped(weight))
    codes = layout.codes_of(layout.grouped(weight), scale, offset).reshape(10, 24)
    flat = None if offset is None else offset[..., 0]
    grid = FixedGrid(layout, codes, scale[..., 0], flat, factor=factor, input_scale=scale_in)
    stack(linear, grid)
    if activation_bits:
        linear.register_forward_pre_hook(RoundActivations(activation_bits, scale_in, factor))
    values = torch.randn(2, 3, 24)
    chained = linear(values).detach()
    record = fold({"it": linear})["it"]
    kinds = {"zero": layout.zero, "factored": factored, "one_scale": one_scale}
    integer, again = (
        IntegerLinear(24, 10, bits=bits, group=group, activation_bits=activation_bits, bias=linear.bias, **kinds)  # type: ignore[arg-type]
        for _ in range(2)
    )
    integer.store(**record)
    assert torch.equal(integer.dequantized(), linear.weight)
    assert torch.allclose(integer(values), chained, atol=2e-6)
    again.load_state_dict(integer.state_dict())
    assert torch.equal(again(values), integer(values))
    assert (again.integer_product is not None) == (activation_bits == 8 and group is None and layout.symmetric)


def test_inputs_beyond_one_scale_are_clipped() -> None:
    assert input_codes(torch.tensor([-300.0, -1.4, 0.5, 2.6, 127.6]), torch.tensor(1.0), 8).tolist() == [
        -127, -1, 0, 3, 127,
    ]  # fmt: skip


def test_a_card_of_an_older_version_is_read() -> None:
    edit = from_json(
        {"edit": "niwaki.compression.quantize.integers:UseIntegers", "modules": ["0"], "bits": 4, "group": 8,
         "activation_bits": None}
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(16, 4))
    edit.apply(model)
    assert isinstance(model[0], IntegerLinear)
    assert (model[0].zero, model[0].factor, model[0].input_scale) == (None, None, None)


def integer_linear(
    bits: int,
    group: int | None,
    activation_bits: int | None,
    *,
    bias: bool = True,
    size: tuple[int, int] = (24, 10),
) -> tuple[IntegerLinear, Tensor, Tensor]:
    """The layer, its codes and its scales."""
    linear = nn.Linear(*size, bias=bias)
    record = IntegerGrid(bits, group).record(linear.weight.data)
    integer = IntegerLinear(*size, bits=bits, group=group, activation_bits=activation_bits, bias=linear.bias)
    integer.store(record["codes"], record["scale"])
    return integer, record["codes"], record["scale"]


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_stored_is_the_folded_weight_bit_for_bit(bits: int, group: int | None) -> None:
    weight = torch.randn(10, 24)
    grid = IntegerGrid(bits, group)
    record = grid.record(weight)
    integer = IntegerLinear(24, 10, bits=bits, group=group, activation_bits=None, bias=None)
    integer.store(record["codes"], record["scale"])
    assert torch.equal(integer.integers(), record["codes"])
    assert torch.equal(integer.dequantized(), grid(weight))
    assert integer.codes.numel() * integer.codes.element_size() == 240 * bits // 8
    assert integer.scale.shape == (10, 24 // (group or 24))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_integer_product_is_exact(bits: int, bias: bool, rows: int) -> None:
    integer, codes, scale = integer_linear(bits, None, 8, bias=bias)
    assert integer.integer_product
    values = torch.randn(rows, 24)
    tokens = values.abs().amax(1, keepdim=True) / 127
    rounded = (values / tokens).round().clamp(-127, 127).to(torch.int64)
    product = rounded @ codes.to(torch.int64).t()  # exact
    expected = product.double() * tokens.double() * scale.double().t()
    if integer.bias is not None:
        expected += integer.bias.double()
    assert torch.allclose(integer(values).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_integer_path_differs_from_the_dequantized_one_by_rounding_only(bits: int) -> None:
    integer, _, _ = integer_linear(bits, None, 8, size=(256, 32))
    values = torch.randn(3, 7, 256)
    codes, scale = to_codes(values, 8)
    dequantized = functional.linear(codes * scale, integer.dequantized(), integer.bias)
    # fp32 summation of n terms: relative error of n eps on the sum of magnitudes
    magnitudes = functional.linear((codes * scale).abs(), integer.dequantized().abs(), integer.bias.abs())  # type: ignore[union-attr]
    bound = 256 * torch.finfo(torch.float32).eps * magnitudes
    assert bool(((integer(values) - dequantized).abs() <= bound).all())


@pytest.mark.parametrize(("group", "activation_bits"), [(None, None), (8, None), (8, 8), (None, 5)])
def test_every_path_is_that_of_the_grid_in_training(group: int | None, activation_bits: int | None) -> None:
    linear = nn.Linear(24, 10)
    put_on_grid({"it": linear}, 4, group, activation_bits)
    values = torch.randn(2, 3, 24)
    trained = linear(values).detach()
    record = linear.parametrizations.weight[0].record(linear.parametrizations.weight.original.detach())  # type: ignore[union-attr, operator, index]
    integer = IntegerLinear(24, 10, bits=4, group=group, activation_bits=activation_bits, bias=linear.bias)
    integer.store(record["codes"], record["scale"])
    assert torch.allclose(integer(values), trained, atol=1e-6)
    if group or not activation_bits:
        assert torch.equal(integer(values), trained)


def test_half_precision_in_and_out() -> None:
    for layer in (integer_linear(8, None, 8)[0], integer_linear(4, 8, 8)[0].to(torch.bfloat16)):
        assert layer(torch.randn(2, 24, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_new_codes_replace_the_operand_that_was_kept() -> None:
    integer, codes, scale = integer_linear(8, None, 8)
    values = torch.randn(2, 24)
    before = integer(values)
    state: Any = integer.state_dict()
    integer.store(-codes, scale)
    assert not torch.equal(integer(values), before)
    integer.load_state_dict(state)
    assert torch.equal(integer(values), before)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_gradient_passes_after_a_first_use_in_inference_mode(activation_bits: int | None) -> None:
    integer, _, _ = integer_linear(4, 8, activation_bits)
    values = torch.randn(2, 24)
    with torch.inference_mode():
        inside = integer(values)
    assert torch.equal(integer(values.requires_grad_()), inside)
    integer(values).sum().backward()
    assert integer.bias.grad is not None  # type: ignore[union-attr]


def test_the_edit_makes_empty_layers_of_the_right_shape() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 3, bias=False))
    bias = model[0].bias
    UseIntegers(modules=["0"], bits=5, group=8, activation_bits=None).apply(model)
    assert model[0].codes.shape == (16 * 4 * 5 // 8,)
    assert model[0].scale.shape == (4, 2)
    assert model[0].bias is bias
    assert isinstance(model[1], nn.Linear)
    with torch.device("meta"):
        UseIntegers(modules=["1"], bits=8, group=None, activation_bits=8).apply(model)
    assert model[1].codes.shape == (3, 4)
    assert model[1].bias is None
