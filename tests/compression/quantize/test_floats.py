"""Weights as floats of 8 and 16 bits: the codes are torch's own, the file holds them, the product is that of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import saved
from lifecycle import check_in_a_fresh_process, live, recipe_of, write_rows
from torch import Tensor, nn

from niwaki import artifact, storage
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize import floats as stored_floats
from niwaki.compression.quantize.bf16 import BFloat16
from niwaki.compression.quantize.float8 import Float8
from niwaki.compression.quantize.floats import TYPES, FloatGrid, FloatLinear, UseFloats, to_floats
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.share.codebook import CodebookSharing
from niwaki.edits import from_json
from niwaki.errors import ArtifactError, ConfigError
from niwaki.stage import refuse_conflicts
from niwaki.weights import fold, packed

STAGES = {
    "e4m3": Float8(), "e5m2": Float8(format="e5m2"), "activations": Float8(activations=True), "bf16": BFloat16(),
    "some": BFloat16(targets=["feed_in", "feed_out"]),
}  # fmt: skip
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def of_fields(value: float, exponent: int, fraction: int, least: int) -> float:
    """The float with so many bits of fraction, and `least` as the smallest exponent, nearest to a value; ties to
    even. By hand, without a cast."""
    if value == 0.0:
        return 0.0
    power = max(torch.tensor(abs(value), dtype=torch.float64).log2().floor().int().item(), least)
    step = 2.0 ** (power - fraction)
    return round(value / step) * step


@pytest.mark.parametrize(("dtype", "bits", "least"), [("float8_e4m3fn", (4, 3), -6), ("float8_e5m2", (5, 2), -14)])
def test_floats_by_hand(dtype: str, bits: tuple[int, int], least: int) -> None:
    weight = torch.randn(6, 40) * torch.logspace(-2, 2, 6)[:, None]
    weight[2], weight[3, :20] = 0.0, 0.0
    grid = FloatGrid(TYPES[dtype])
    record = grid.record(weight)
    assert record["floats"].dtype is TYPES[dtype]
    for row, floats, (scale,) in zip(weight, record["floats"], record["scale"].tolist(), strict=True):
        largest = float(row.abs().max())
        assert scale == pytest.approx(largest / LARGEST[dtype] if largest else 1.0, rel=1e-6)
        expected = [of_fields(float(value), *bits, least) for value in row / scale]
        assert floats.tolist() == expected
        assert torch.equal(floats.view(torch.uint8), (row / scale).to(TYPES[dtype]).view(torch.uint8))
    values = record["floats"].float() * record["scale"]
    assert torch.equal(grid(weight), values)
    assert bool((values[weight == 0] == 0).all())
    assert float((values - weight).abs().max() / weight.abs().max()) <= 2.0 ** -(bits[1] + 1)


def test_bfloat16_is_the_upper_half_of_fp32_and_a_projection() -> None:
    weight = torch.randn(8, 30)
    record = FloatGrid(torch.bfloat16).record(weight)
    whole = weight.view(torch.int32)
    upper = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16  # to nearest, ties to even
    assert torch.equal(record["floats"].view(torch.int16).int(), upper.to(torch.int16).int())
    once = FloatGrid(torch.bfloat16)(weight)
    assert torch.equal(FloatGrid(torch.bfloat16)(once), once)
    assert record.keys() == {"floats"}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("gpt2", "causal_lm"), ("t5", "ner")])
def test_what_is_saved(name: str, family: str, task: str, setting: Callable[..., Any], tmp_path: Path) -> None:
    one, stage = setting(family, task), STAGES[name]
    plain = one.logits()
    weights = {each: linear.weight.detach().clone() for each, linear in one.context().targets.items()}
    biases = one.context().targets
    kept = {each: linear.bias for each, linear in biases.items()}
    fresh = saved(one, tmp_path / "model", stage)
    stored, forms = storage.parts(artifact.weights_of(tmp_path / "model"))
    assert not [each for each in forms if each.endswith(".floats")]
    found = {each: module for each, module in packed(fresh.model) if isinstance(module, FloatLinear)}
    assert len(found) == len(weights) if name != "some" else 0 < len(found) < len(weights)
    for each, module in found.items():
        assert stored[f"{each}.floats"].dtype is TYPES[stage.dtype]
        expected = FloatGrid(TYPES[stage.dtype])(weights[each])
        assert torch.equal(module.dequantized(), expected)
        assert stored[f"{each}.floats"].nbytes == weights[each].numel() * (2 if stage.dtype == "bfloat16" else 1)
        assert f"{each}.weight" not in stored
        assert (module.bias is None) == (kept[each] is None)
    assert torch.equal(one.logits(fresh.model), one.logits())
    difference = float((one.logits() - plain).abs().max() / plain.abs().max())
    assert 0 < difference < {"bf16": 0.01, "some": 0.01}.get(name, 0.3)
    dense = artifact.load_merged(tmp_path / "model").model
    if name != "activations":
        torch.testing.assert_close(one.logits(dense), one.logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["e4m3", "bf16", "activations"])
def test_the_chain_is_what_is_stored(name: str, setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    context, stage = one.context(), STAGES[name]
    Magnitude(sparsity=0.5).prepare(one.model, context)
    stage.prepare(one.model, context)
    chained = one.logits()
    context.records.update(fold(context.targets))
    folded = {each: linear.weight.detach().clone() for each, linear in context.targets.items()}
    stage.finalize(one.model, context)
    torch.testing.assert_close(one.logits(), chained, rtol=1e-4, atol=1e-5)
    for each, module in packed(one.model):
        assert torch.equal(module.dequantized(), folded[each])
        assert float((module.dequantized() == 0).float().mean()) >= 0.5


def linear_of(dtype: str, *, activations: bool, size: tuple[int, int] = (32, 48)) -> tuple[FloatLinear, Tensor]:
    weight = torch.randn(size) * torch.logspace(-1, 1, size[0])[:, None]
    linear = FloatLinear(
        size[1], size[0], dtype=TYPES[dtype], bias=nn.Parameter(torch.randn(size[0])), activations=activations
    )  # fmt: skip
    linear.store(**FloatGrid(TYPES[dtype]).record(weight), **({} if dtype != "bfloat16" else {"scale": None}))
    return linear, weight


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_product_of_floats_is_that_of_what_they_stand_for(dtype: str) -> None:
    """torch._scaled_mm, which a GPU takes, with the scales of rows and of tokens; here on a CPU."""
    linear, _ = linear_of(dtype, activations=True)
    values = torch.randn(3, 5, 48) * torch.logspace(-2, 2, 15).view(3, 5, 1)
    values[1, 2] = 0.0
    floats, scale = to_floats(values.reshape(-1, 48), torch.float8_e4m3fn)
    exact = (floats.double() * scale) @ (linear.floats.double() * linear.scale.double()).t()  # type: ignore[union-attr]
    product = linear.product(floats, scale, torch.float32)
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    found = linear(values).detach().view(-1, 32) - linear.bias.detach()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    rounded = linear.product(floats, scale, torch.bfloat16)
    assert float((rounded.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


def test_a_product_of_floats_has_the_bias_and_the_shape_of_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _ = linear_of("float8_e4m3fn", activations=True)
    linear.requires_grad_(False)
    values = torch.randn(3, 5, 48)
    expected = linear(values)
    monkeypatch.setattr(stored_floats, "runs_in_float8", lambda _: True)
    found = linear(values)
    assert found.dtype is values.dtype
    assert found.shape == expected.shape
    sums = expected - linear.bias
    assert float((found - expected).abs().max()) <= 2**-8 * float(sums.abs().max())


@pytest.mark.parametrize(
    ("place", "capability", "dtype", "size", "expected"),
    [("cuda", (9, 0), "float8_e4m3fn", (32, 48), True), ("cuda", (8, 9), "float8_e4m3fn", (32, 48), True),
     ("cuda", (8, 6), "float8_e4m3fn", (32, 48), False), ("cpu", (9, 0), "float8_e4m3fn", (32, 48), False),
     ("cuda", (9, 0), "float8_e5m2", (32, 48), False), ("cuda", (9, 0), "float8_e4m3fn", (30, 48), False),
     ("cuda", (9, 0), "float8_e4m3fn", (32, 40), False)],
)  # fmt: skip
def test_which_gpus_multiply_floats_of_8_bits(
    place: str, capability: tuple[int, int], dtype: str, size: tuple[int, int], expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Those of capability 8.9 and later: e4m3 on both sides, and sizes that 16 divides."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    linear: Any = SimpleNamespace(
        floats=SimpleNamespace(device=torch.device(place), dtype=TYPES[dtype]),
        in_features=size[1],
        out_features=size[0],
    )
    assert stored_floats.runs_in_float8(linear) is expected


@pytest.mark.parametrize("dtype", TYPES)
def test_another_type_of_the_model_leaves_what_is_stored(dtype: str) -> None:
    linear, _ = linear_of(dtype, activations=False)
    before = linear.dequantized()
    linear.to(torch.bfloat16).to(torch.float16).float()
    assert linear.floats.dtype is TYPES[dtype]
    assert torch.equal(linear.dequantized(), before)
    assert linear.to(torch.bfloat16)(torch.randn(2, 48, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "activations", "bf16"])
def test_onnx(name: str, setting: Callable[..., Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx

    from niwaki.export.onnx import FILE, Onnx

    one = setting("llama", "causal_lm")
    fresh = saved(one, tmp_path / "model", STAGES[name])
    expected = one.logits(fresh.model)
    given = one.task.inputs(one.batch())
    (tmp_path / "exported").mkdir()
    Onnx(cache=False).write(fresh, given, tmp_path / "exported")
    session = onnxruntime.InferenceSession(tmp_path / "exported" / FILE)
    found = torch.from_numpy(session.run(["logits"], {key: tensor.numpy() for key, tensor in given.items()})[0])
    off = (found - expected).abs().amax(-1) / expected.abs().max().clamp(min=1.0)
    assert float(off.median()) <= 1e-5
    assert float(off.max()) <= 0.03
    kinds = {"bf16": "BFLOAT16", "e5m2": "FLOAT8E5M2"}
    held = [one for one in onnx.load(tmp_path / "exported" / FILE).graph.initializer if one.name.endswith(".floats")]
    assert len(held) == 21
    assert {one.data_type for one in held} == {getattr(onnx.TensorProto, kinds.get(name, "FLOAT8E4M3FN"))}


@pytest.mark.parametrize(
    "settings",
    [
        ["compression=[prune/magnitude,quantize/float8]", "compression.magnitude.sparsity=0.75", "tuning=lora"],
        ["compression=[quantize/bf16,prune/neurons]", "compression.neurons.ratio=0.25",
         "compression.neurons.schedule=cubic", "compression.neurons.interval=1"],
    ],
)  # fmt: skip
def test_runs(settings: list[str], tmp_path: Path) -> None:
    """With a mask and merged adapters, and with units that are cut after the fit: the same in another process."""
    folder = live(recipe_of("classification", write_rows(tmp_path)["classification"], *settings), tmp_path / "run")
    found: dict[str, Any] = dict(packed(artifact.load(folder).model))
    assert len(found) == 18
    if "tuning=lora" in settings:
        stored, forms = storage.parts(artifact.weights_of(folder))
        assert len(forms) == 18  # the zeros are not in the file
        assert all(float((module.dequantized() == 0).float().mean()) >= 0.75 for module in found.values())
        dense = sum(module.floats.nbytes for module in found.values())
        assert sum(tensor.nbytes for name, tensor in stored.items() if ".floats" in name) < 0.4 * dense
    check_in_a_fresh_process([folder])


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"^compression\.float8\.format='e3m4': needs one of e4m3, e5m2"):
        Float8(format="e3m4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^compression\.bf16\.targets=\['gate'\]: needs a regular expression"):
        BFloat16(targets=["gate"])
    with pytest.raises(ConfigError, match=r"quantize/float8 and quantize/int8: each puts the weights on its own grid"):
        refuse_conflicts([Int8(), Float8()])
    with pytest.raises(ConfigError, match=r"quantize/bf16 and share/codebook: each stores the weights in its own way"):
        refuse_conflicts([BFloat16(), CodebookSharing()])
    record = UseFloats(modules=[], dtype="bfloat16").to_json()
    assert from_json(record) == UseFloats(modules=[], dtype="bfloat16")
    with pytest.raises(ArtifactError, match="dtype 'int3' is not one of"):
        from_json(record | {"dtype": "int3"})
