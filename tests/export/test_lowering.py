"""Packed linears as nodes of ONNX say what they say in torch: the integers are the same ones, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exported import IN, OUT, answered, by_hand, integers, lowered, rows, widened
from torch import nn

from niwaki.compression.quantize import kernels
from niwaki.compression.quantize.integers import IntegerLinear, to_codes
from niwaki.compression.share.stored import CodebookLinear

ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from niwaki.export import lowering  # noqa: E402
from niwaki.export.runner import sums_are_exact  # noqa: E402


def stored(model: Any) -> dict[str, Any]:
    """The tensors in the file, by what they are."""
    found = {value.name.rpartition(".")[2]: value.const_value for value in model.graph.initializers.values()}
    return {name: tensor for name, tensor in found.items() if not name.isdigit()}


@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("kernels", ["portable", "onnxruntime"])
@pytest.mark.parametrize("activation_bits", [None, 8, 4])
@pytest.mark.parametrize("group", [None, 16, 8])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_it_says_what_the_linear_says(
    bits: int, group: int | None, activation_bits: int | None, kernels: str, optimized: bool
) -> None:
    if activation_bits and not optimized and not sums_are_exact():
        pytest.skip("without VNNI it takes an optimization of the graph to sum exactly")
    linear, values = integers(bits, group, activation_bits), rows()
    (found,) = answered(lowered(linear, 25 if bits == 2 else 21, kernels), values, optimized=optimized)
    expected = linear(values).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-6)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("activation_bits", [8, 3])
def test_the_sums_of_products_are_the_same_integers(bits: int, activation_bits: int) -> None:
    linear, values = integers(bits, None, activation_bits), rows()
    model = lowered(linear, 25 if bits == 2 else 21)
    (product,) = [node for node in model.graph if node.op_type == "MatMulInteger"]
    product.outputs[0].name = "sums"
    product.outputs[0].dtype = ir.DataType.INT32
    model.graph.outputs.append(product.outputs[0])
    _, sums = answered(model, values)
    codes, _ = to_codes(values.reshape(-1, IN), activation_bits)
    expected = codes.to(torch.int64) @ linear.integers().to(torch.int64).t()
    assert int(expected.abs().max()) > 10
    assert np.array_equal(sums.reshape(-1, OUT), expected.numpy())


def test_the_machine_that_exports_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of integers stay so in the file where the CPU has no kernel of torch's that gives them exactly."""
    monkeypatch.setattr(kernels, "product_of", lambda _: None)
    linear = integers(8, None, 8)
    assert linear.integer_product is None
    assert [node.op_type for node in lowered(linear).graph].count("MatMulInteger") == 1


def test_halves_are_rounded_to_even() -> None:
    """Codes 0.5, 1.5 and 2.5 become 0, 2 and 2, as torch has it."""
    linear = IntegerLinear(IN, OUT, bits=8, group=None, activation_bits=8, bias=None)
    codes = torch.zeros(OUT, IN, dtype=torch.int8)
    codes[:4, :4] = torch.eye(4, dtype=torch.int8)
    linear.store(codes, torch.ones(OUT, 1))
    values = torch.zeros(1, 1, IN)
    values[0, 0, :4] = torch.tensor([0.5, 1.5, -2.5, 127.0])
    (found,) = answered(lowered(linear), values)
    assert found[0, 0, :4].tolist() == [0.0, 2.0, -2.0, 127.0]


def test_a_linear_without_a_bias_has_none() -> None:
    linear, values = integers(8, None, 8, bias=False), rows()
    model = lowered(linear)
    assert "bias" not in stored(model)
    (found,) = answered(model, values)
    torch.testing.assert_close(torch.from_numpy(found), linear(values))


@pytest.mark.parametrize(
    ("bits", "opset", "kind", "nbytes"),
    [
        (8, 21, "INT8", OUT * IN), (5, 21, "INT8", OUT * IN), (4, 21, "INT4", OUT * IN // 2),
        (3, 21, "INT4", OUT * IN // 2), (2, 21, "INT4", OUT * IN // 2), (2, 25, "INT2", OUT * IN // 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("group", "activation_bits"), [(None, 8), (16, None)])
def test_codes_are_as_narrow_in_the_file_as_their_type(
    bits: int, opset: int, kind: str, nbytes: int, group: int | None, activation_bits: int | None
) -> None:
    linear = integers(bits, group, activation_bits)
    model = lowered(linear, opset)
    codes = stored(model)["codes"]
    assert codes.dtype.name == kind
    assert codes.nbytes == nbytes == len(codes.tobytes())
    weight = codes.numpy().astype(np.int8)
    ours = linear.integers().numpy()
    assert np.array_equal(weight.T if group is None else weight, ours)
    assert int((ours == 0).sum()) >= 0.2 * ours.size


def test_zeros_stay_zeros_where_blocks_are_multiplied_by_one_kernel() -> None:
    """4-bit codes are stored with 8 added, and 8 is their zero point: what is pruned does nothing to the sum."""
    linear = integers(4, 16, None)
    assert linear.integers().eq(0).sum() >= 0.2 * OUT * IN
    tensors = stored(lowered(linear, kernels="onnxruntime"))
    packed = tensors["codes"].numpy()
    unsigned = np.stack([packed & 15, packed >> 4], -1).reshape(OUT, IN)
    assert np.array_equal(unsigned.astype(np.int8) - 8, linear.integers().numpy())
    assert set(tensors["zero"].numpy().tolist()) == {0x88, 0x08}  # three groups a row: one nibble is left over
    assert packed.nbytes == OUT * IN // 2


@pytest.mark.parametrize("kernels", ["portable", "onnxruntime"])
@pytest.mark.parametrize("parts", [("whole",), ("real",), ("factor",), ("whole", "factor"), ("input_scale",),
                                   ("factor", "input_scale")])  # fmt: skip
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 16), (4, 8)])
def test_what_else_a_linear_may_hold(
    bits: int, group: int | None, activation_bits: int | None, parts: tuple[str, ...], kernels: str
) -> None:
    """Zeros, whole or real; a factor of the input; a scale of the input that was measured before."""
    linear, values = widened(integers(bits, group, activation_bits), *parts), torch.randn(3, 5, IN)
    expected = by_hand(linear, values)
    (found,) = answered(lowered(linear, kernels=kernels), values)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)


def test_signs_alone() -> None:
    """Codes of one bit are -1 and 1, in two bits each."""
    linear = integers(2, 16, None)
    signs = torch.where(torch.rand(OUT, IN) < 0.5, -1, 1).to(torch.int8)
    linear.store(signs, torch.rand(OUT, IN // 16))
    linear.bits = 1
    linear.integers = lambda: signs  # type: ignore[method-assign]
    model, values = lowered(linear, 25), rows()
    assert stored(model)["codes"].nbytes == OUT * IN // 4
    (found,) = answered(model, values)
    torch.testing.assert_close(torch.from_numpy(found), linear(values).detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows_of_table", [None, 8])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    ("bits", "kinds"), [(2, ("UINT4", "UINT4")), (4, ("UINT4", "UINT8")), (8, ("UINT8", "UINT16"))]
)
def test_shared_values_are_gathered(bits: int, kinds: tuple[str, str], pruned: bool, rows_of_table: int | None) -> None:
    mask = torch.rand(OUT, IN) < 0.6 if pruned else None
    linear = CodebookLinear(
        IN, OUT, bits=bits, rows=rows_of_table, kept=int(mask.sum()) if mask is not None else None,
        bias=nn.Parameter(torch.randn(OUT)),
    )  # fmt: skip
    indices = torch.randint(2**bits, (OUT, IN), dtype=torch.uint8)
    linear.store(indices, torch.randn(OUT // (rows_of_table or OUT), 2**bits), mask)
    model, values = lowered(linear), rows()
    tensors = stored(model)
    assert tensors["indices"].dtype.name == kinds[pruned]
    (found,) = answered(model, values)
    expected = linear(values).detach()
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-6)


def test_integers_over_shared_values_are_those_integers() -> None:
    shared = CodebookLinear(IN, OUT, bits=3, rows=None, kept=None, bias=None)
    shared.store(torch.randint(8, (OUT, IN), dtype=torch.uint8), torch.randn(1, 8), None)
    linear = IntegerLinear(IN, OUT, bits=8, group=None, activation_bits=8, bias=None, shared=shared)
    codes, scale = to_codes(shared.dequantized(), 8)
    linear.store(codes.to(torch.int8), scale)
    model = lowered(linear)
    assert np.array_equal(stored(model)["codes"].numpy().T, linear.integers().numpy())
    (found,) = answered(model, values := rows())
    torch.testing.assert_close(torch.from_numpy(found), linear(values))


def test_a_block_that_runs_twice_holds_its_codes_once() -> None:
    linear = integers(8, None, 8)
    block = nn.Sequential(linear, nn.ReLU())
    model = nn.ModuleList([block, block])
    held = lowering.hold_out(model)
    assert list(held.values()) == [linear]
    assert model[0][0] is model[1][0]  # type: ignore[index]
    assert isinstance(model[0][0], lowering.Placeholder)  # type: ignore[index]


def test_an_unknown_kind_of_packed_linear_becomes_dense() -> None:
    from niwaki.tuning.normal_float import NormalFloatLinear

    packed = NormalFloatLinear(IN, OUT, block=16, double_quantization=False, bias=None)
    packed.store(torch.randn(OUT, IN))
    model = nn.Sequential(packed)
    assert lowering.hold_out(model) == {}
    lowering.to_plain(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, packed.dequantized())
