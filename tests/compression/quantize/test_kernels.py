"""Kernels against int64; what runs where; chains against the integers that they become."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import by_hand, integers, rows, widened
from lifecycle import begin, logits, recipe_of, write_rows
from torch import nn

from niwaki.compression.quantize import kernels
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.kernels import (
    FLOATS,
    PRODUCTS,
    FloatProduct,
    IntegerProduct,
    Product,
    agreement,
    integer_product,
    product_of,
)
from niwaki.compression.quantize.layout import Layout
from niwaki.export.export import rounds_inputs
from niwaki.export.torch import TracedIntegers
from niwaki.measure.report import kernel_line
from niwaki.pipeline import fold_and_convert, settle
from niwaki.weights import kernels as kernels_of
from niwaki.weights import packed

OPTIONS = sorted(path.stem for path in (Path(__file__).parents[3] / "configs/compression/quantize").glob("*.yaml"))
CPU = torch.device("cpu")
EXACT = pytest.mark.skipif(not kernels.is_exact(PRODUCTS["cpu"]), reason="this CPU clips sums of int8 products")


KERNELS = [*(pytest.param(one, marks=EXACT) for one in PRODUCTS.values()), FLOATS]


@pytest.mark.parametrize("product", KERNELS)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 24, 10), (7, 33, 5), (16, 64, 8), (40, 3072, 9)])
def test_sums_are_those_of_int64(product: Product, tokens: int, inputs: int, outputs: int) -> None:
    """That of CUDA too, whose filling runs here."""
    codes = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    found = product(codes, product.operand(weight), outputs)
    assert torch.equal(found.long(), codes.long() @ weight.long().t())


@pytest.mark.parametrize("product", KERNELS)
@pytest.mark.parametrize(("left", "right"), [(127, 127), (127, -127), (-127, -127)])
@pytest.mark.parametrize("inputs", [2, 64, 1023, 1024, 1025, 3072, 133_000])
def test_the_largest_sums_are_exact(product: Product, left: int, right: int, inputs: int) -> None:
    codes, weight = (torch.full((n, inputs), code, dtype=torch.int8) for n, code in ((3, left), (5, right)))
    codes[0, 0] = 126  # an odd sum, which fp32 holds up to 2^24 alone
    expected = left * right * inputs + (126 - left) * right
    found = product(codes, product.operand(weight), 5).long()
    assert found[0].unique().tolist() == [expected]
    assert found[1:].unique().tolist() == [left * right * inputs]


def test_what_cuda_is_given_meets_its_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[torch.Size, torch.Size]] = []

    def product_of_cuda(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        given.append((left.shape, right.shape))
        return torch.zeros(len(left), right.shape[1], dtype=torch.int32)

    monkeypatch.setattr(torch, "_int_mm", product_of_cuda)
    product = PRODUCTS["cuda"]
    for tokens, inputs, outputs in [(1, 24, 10), (16, 33, 8), (17, 64, 7), (40, 5, 3)]:
        operand = product.operand(torch.zeros(outputs, inputs, dtype=torch.int8))
        found = product(torch.zeros(tokens, inputs, dtype=torch.int8), operand, outputs)
        assert found.shape == (tokens, outputs)
    assert all(left[0] > 16 and left[1] % 8 == 0 and left[1] == right[0] and right[1] % 8 == 0 for left, right in given)


def test_where_codes_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, own = Layout(bits=8), IntegerProduct(device="cpu")
    monkeypatch.setattr(kernels, "product_of", lambda device: own if device == "cpu" else None)
    assert integer_product(CPU, plain, 8, 768) is own
    assert integer_product(CPU, Layout(bits=3), 5, 768) is own
    assert integer_product(CPU, plain, None, 768) is None
    assert integer_product(CPU, Layout(bits=8, group=64), 8, 768) is None
    assert integer_product(CPU, Layout(bits=8, zero="whole"), 8, 768) is None
    assert integer_product(torch.device("meta"), plain, 8, 768) is None
    assert integer_product(CPU, plain, 8, 133_144) is own  # 133,144 * 127^2 < 2^31
    assert integer_product(CPU, plain, 8, 133_145) is None


@pytest.mark.parametrize(("bits", "activation_bits", "part"), [(8, 8, 1040), (4, 8, 18_872), (2, 2, 2**24)])
def test_a_part_is_as_long_as_sums_stay_exact(
    bits: int, activation_bits: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "product_of", lambda _: FLOATS)
    product = integer_product(CPU, Layout(bits=bits), activation_bits, 2100)
    assert product == FloatProduct(part=part)
    assert part * Layout(bits=bits).highest * (2 ** (activation_bits - 1) - 1) <= 2**24


@pytest.mark.parametrize(
    ("exact", "slow", "chosen"), [(True, False, "own"), (True, True, "floats"), (False, False, "floats")]
)
def test_the_kernel_is_one_that_is_exact_and_not_slow(
    exact: bool, slow: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "is_exact", lambda _: exact)
    monkeypatch.setattr(kernels, "is_slow", lambda _: slow)
    assert product_of.__wrapped__("cpu") is {"own": PRODUCTS["cpu"], "floats": FLOATS}[chosen]
    assert product_of.__wrapped__("cuda") is (PRODUCTS["cuda"] if exact else None)
    assert product_of.__wrapped__("meta") is None


@dataclass(frozen=True)
class Delayed(FloatProduct):
    seconds: float = 0.0

    def __call__(self, *given: Any) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().__call__(*given)


def test_what_takes_many_times_as_long_as_floats_is_slow() -> None:
    """Wherever tensors are made unless a device is named."""
    with torch.device("meta"):
        assert kernels.is_slow(Delayed(seconds=0.05))
        assert not kernels.is_slow(Delayed())


def test_a_converted_linear_is_not_many_times_slower_than_a_dense_one() -> None:
    dense, values = nn.Linear(512, 512), torch.randn(64, 512)
    linear = IntegerLinear(512, 512, bits=8, group=None, activation_bits=8, bias=None)

    def taken(model: Any) -> float:
        start = time.perf_counter()
        model(values)
        return time.perf_counter() - start

    with torch.no_grad():
        times = [(taken(dense), taken(linear)) for _ in range(10)]
    assert min(other for _, other in times) < 10 * min(one for one, _ in times)


def test_numbers_that_are_none_stay_so() -> None:
    codes, weight = torch.ones(2, 2100), torch.ones(3, 2100, dtype=torch.int8)
    codes[0, 5] = torch.nan
    found = FLOATS(codes, FLOATS.operand(weight), 3)
    assert found[0].isnan().all()
    assert found[1].tolist() == [2100.0] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_what_its_machine_needs(copied: Callable[[Any], Any]) -> None:
    linear, values = integers(8, None, 8), rows()
    expected = linear(values)
    other = copied(linear)
    assert other._operand is other._product is None
    assert torch.equal(other(values), expected)


def test_under_autocast_sums_are_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "product_of", lambda _: FLOATS)
    linear, values = integers(8, None, 8), rows()
    traced = TracedIntegers(linear)
    program = torch.export.export(traced, (values,)).module()
    expected = linear(values)
    with torch.autocast("cpu", torch.bfloat16):
        for one in (linear, traced, program):
            assert torch.equal(one(values), expected)


def test_eight_bits_are_multiplied_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "product_of", PRODUCTS.get)
    linear = integers(8, None, 8)
    linear(torch.randn(2, 48))
    assert linear._operand is not None
    assert linear._operand.data_ptr() == linear.codes.data_ptr()


@pytest.mark.parametrize("parts", [(), ("factor",), ("input_scale",), ("factor", "input_scale")])
def test_without_a_kernel_the_weight_is_dequantized(parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    linear = widened(integers(8, None, 8), *parts)
    monkeypatch.setattr(kernels, "product_of", lambda _: None)
    assert linear.kernel == "fp32, dequantized"
    values = rows()
    expected = by_hand(linear, values)
    assert float((linear(values).detach() - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


CLIPPING = """
import torch
from niwaki.compression.quantize.integers import IntegerGrid, IntegerLinear
from niwaki.compression.quantize.kernels import FLOATS, PRODUCTS
product, codes = PRODUCTS["cpu"], torch.full((9, 16), 127, dtype=torch.int8)
clips = product(codes, product.operand(codes), 9).unique().tolist() != [16 * 127**2]
record = IntegerGrid(8, None).record(torch.ones(9, 16))
linear = IntegerLinear(16, 9, bits=8, group=None, activation_bits=8, bias=None)
linear.store(**record)
off = float((linear(torch.ones(5, 16)) - 16).abs().max())
print(clips, linear.kernel == FLOATS.name, off < 1e-4)
"""


def test_a_cpu_that_clips_sums_gets_the_right_ones_from_floats() -> None:
    """oneDNN told to keep from VNNI; a processor that has none of it may sum without it."""
    variables = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CLIPPING], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    clips, floats, right = done.stdout.split()
    assert right == "True"
    assert (clips, floats) != ("True", "False")


@pytest.mark.parametrize("product", KERNELS)
@pytest.mark.parametrize("static", [False, True])
def test_compiled_it_is_the_same_function(static: bool, product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has its operand; traced as a whole, without a compiler of C++."""
    monkeypatch.setattr(kernels, "product_of", lambda _: product)
    linear = widened(integers(8, None, 8), *["input_scale"] * static)
    values = rows()
    with torch.no_grad():
        expected = linear(values)
        assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(values), expected)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "embeddings"])  # no linears
def test_a_converted_model_says_what_its_chains_said(option: str, task: str, tmp_path: Path) -> None:
    """Tiny BERT and tiny Llama, every option. The bound is relative, and the middle answer is off by float order."""
    recipe = recipe_of(task, write_rows(tmp_path)[task], f"compression=[quantize/{option}]", checkpoints=False)
    corpus, work = begin(recipe)
    settle(recipe, work)
    inputs = recipe.task.inputs(next(iter(corpus.evaluation("test"))))
    before = logits(work.model, inputs)
    fold_and_convert(recipe, work)
    linears = [linear for _, linear in packed(work.model)]
    assert len(linears) == len(work.context.targets) > 0
    off = (logits(work.model, inputs) - before).abs().amax(-1) / before.abs().max()
    bits = max((getattr(linear, "activation_bits", None) or 0 for linear in linears), default=0)
    assert rounds_inputs(work.model) == bool(bits)
    assert float(off.median()) <= 5e-6  # 1e-7 as it is; 7e-5 at least where scales of inputs are 0.2% off
    assert float(off.max()) <= agreement(bits)
    names = {linear.kernel for linear in linears}
    whole = product_of("cpu") if bits and not any(linear.group for linear in linears) else None
    assert names == {whole.name if whole else "fp32, dequantized"}
    assert kernels_of(work.model) == {names.pop(): len(linears)}


def test_every_option_is_among_them() -> None:
    assert "qat" in OPTIONS
    assert len(OPTIONS) >= 10


def test_a_report_says_it_in_one_line() -> None:
    line = kernel_line({"int8 x int8, torch._int_mm": 36, "fp32, dequantized": 2})
    assert line == "Products with packed weights: 36 by int8 x int8, torch._int_mm; 2 by fp32, dequantized."


def test_one_that_is_not_there_has_a_name() -> None:
    assert IntegerProduct(device="cuda").name == "int8 x int8, torch._int_mm on cuda"
