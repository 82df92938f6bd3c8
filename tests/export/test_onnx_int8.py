"""8 bits everywhere, in the nodes that ONNX Runtime makes one kernel of; our codes where there are some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import IN, OUT, answered, integers, lowered, rows, saved

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from niwaki import artifact  # noqa: E402
from niwaki.compression.factorize.embeddings import Embeddings as Factorized  # noqa: E402
from niwaki.compression.quantize.bf16 import BFloat16  # noqa: E402
from niwaki.compression.quantize.embeddings import Embeddings  # noqa: E402
from niwaki.compression.quantize.float8 import Float8  # noqa: E402
from niwaki.compression.quantize.hqq import HQQ  # noqa: E402
from niwaki.compression.quantize.int8 import Int8  # noqa: E402
from niwaki.compression.quantize.integers import to_codes  # noqa: E402
from niwaki.compression.quantize.weight_only import WeightOnly  # noqa: E402
from niwaki.compression.share.codebook import CodebookSharing  # noqa: E402
from niwaki.errors import ConfigError  # noqa: E402
from niwaki.export.onnx import FILE  # noqa: E402
from niwaki.export.onnx_int8 import OnnxInt8  # noqa: E402
from niwaki.model.anatomy import Anatomy  # noqa: E402
from niwaki.model.embeddings import table_of  # noqa: E402
from niwaki.tuning.adapter import Houlsby  # noqa: E402
from niwaki.tuning.lora import LoRA  # noqa: E402
from niwaki.tuning.qlora import QLoRA  # noqa: E402
from niwaki.weights import packed  # noqa: E402


def test_one_scale_and_one_zero_point_serve_the_whole_input() -> None:
    """Worked out in numpy as ONNX defines DynamicQuantizeLinear: 255 steps from the least to the largest, 0 on one."""
    linear, values = integers(8, None, 8), rows()
    x = values.numpy()
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = np.float32(high - low) / np.float32(255)
    point = int(np.clip(np.rint(-low / step), 0, 255))
    codes = np.clip(np.rint(x / step) + point, 0, 255).astype(np.int64)
    sums = (codes - point).reshape(-1, IN) @ linear.integers().numpy().astype(np.int64).T
    bias: Any = linear.bias
    expected = sums * step * linear.scale[:, 0].numpy() + bias.detach().numpy()
    (found,) = answered(lowered(linear, kernels="dynamic"), values)
    np.testing.assert_allclose(found.reshape(-1, OUT), expected, rtol=1e-4, atol=float(np.abs(expected).max()) * 1e-5)


def test_a_zero_point_of_the_weights_is_taken_off_too() -> None:
    linear, values = integers(8, None, 8), rows()
    (without,) = answered(lowered(linear, kernels="dynamic"), values)
    shifted = integers(8, None, 8)
    shifted.codes = (linear.codes.clamp(-100, 100) + 20).to(torch.int8)
    shifted.scale, shifted.bias = linear.scale, linear.bias
    linear.codes = linear.codes.clamp(-100, 100)
    shifted.zero = torch.full((OUT, 1), 20)
    (without,) = answered(lowered(linear, kernels="dynamic"), values)
    (found,) = answered(lowered(shifted, kernels="dynamic"), values)
    np.testing.assert_allclose(found, without, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm")])
def test_everything_large_is_8_bits_and_there_once(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str
) -> None:
    one = setting(family, task)
    if (bias := one.model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    kept = saved(one, tmp_path / "model", *([Int8()] if family == "bert" else []))
    batch = one.task.inputs(one.batch())
    (tmp_path / "int8").mkdir()
    export = OnnxInt8()
    export.write(artifact.load(kept.folder), batch, tmp_path / "int8")
    held = {tensor.name: tensor for tensor in onnx.load(tmp_path / "int8" / FILE).graph.initializer}
    for name, module in packed(kept.model):
        codes = onnx.numpy_helper.to_array(held[f"{name}.codes"])
        assert np.array_equal(codes.T, module.integers().numpy())  # type: ignore[operator]
    table = kept.model.get_input_embeddings().weight.detach()
    codes, scale = to_codes(table, 8)
    (name,) = [name for name, one in kept.model.named_modules() if one is kept.model.get_input_embeddings()]
    assert np.array_equal(onnx.numpy_helper.to_array(held[f"{name}.codes"]), codes.numpy().astype(np.int8))
    assert np.array_equal(onnx.numpy_helper.to_array(held[f"{name}.scale"]), scale.numpy())
    tied = kept.model.get_output_embeddings().weight is kept.model.get_input_embeddings().weight
    same = [name for name, tensor in held.items() if sorted(tensor.dims) == sorted(table.shape)]
    assert len(same) == (1 if tied else 2)
    blocks = [name for name in held if name.endswith(".codes") and ".layer" in name]
    assert len(blocks) == len(setting(family, task).context().anatomy.linears())
    floats = [t.dims for t in held.values() if t.data_type == 1 and len(t.dims) == 2 and min(t.dims) > 8]
    assert len(floats) <= 2  # positions, and what lies before the head of a masked language model
    runner = export.runner(tmp_path / "int8")
    ours, theirs = kept.model(**batch).logits.detach(), runner(**batch).logits
    seen = batch["attention_mask"].bool()
    off = float((ours - theirs)[seen].abs().max())
    assert 0 < off < 0.1 * float(ours.abs().max())
    assert export.bound(kept.model) is None
    assert export.loss_allowed(kept.model) == 0.01


@pytest.mark.parametrize(
    "stage",
    [WeightOnly(group=16), WeightOnly(bits=8, group=16), HQQ(group=None), Float8(activations=True), BFloat16(),
     CodebookSharing()],
    ids=lambda stage: stage.name,
)  # fmt: skip
def test_what_has_no_scale_per_channel_is_drawn_anew(setting: Callable[..., Any], tmp_path: Path, stage: Any) -> None:
    """On the 8-bit grid of the weight that the artifact's linear stands for."""
    one = setting()
    kept = saved(one, tmp_path / "model", stage)
    batch = one.task.inputs(one.batch())
    (tmp_path / "int8").mkdir()
    OnnxInt8().write(artifact.load(kept.folder), batch, tmp_path / "int8")
    graph = onnx.load(tmp_path / "int8" / FILE).graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    linears = list(packed(kept.model))
    assert len(linears) == len(setting().context().anatomy.linears())
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(linears)
    for name, module in linears:
        codes, scale = to_codes(module.dequantized().float(), 8)
        assert np.array_equal(held[f"{name}.codes"].T, codes.numpy())
        assert np.array_equal(held[f"{name}.scale"], scale[:, 0].numpy())
    ours, theirs = kept.model(**batch).logits.detach(), OnnxInt8().runner(tmp_path / "int8")(**batch).logits
    assert 0 < float((ours - theirs).abs().max()) < 0.1 * float(ours.abs().max())


def test_codes_with_one_scale_per_channel_stay(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    kept = saved(one, tmp_path / "model", WeightOnly(bits=4, group=None))
    (tmp_path / "int8").mkdir()
    OnnxInt8().write(artifact.load(kept.folder), one.task.inputs(one.batch()), tmp_path / "int8")
    graph = onnx.load(tmp_path / "int8" / FILE).graph
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, module in packed(kept.model):
        integers: Any = module
        assert np.array_equal(held[f"{name}.codes"].T.astype(np.int8), integers.integers().numpy())


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_embeddings_keep_their_codes(setting: Callable[..., Any], tmp_path: Path, bits: int) -> None:
    one = setting("llama", "causal_lm")
    kept = saved(one, tmp_path / "model", Embeddings(bits=bits))
    batch = one.task.inputs(one.batch())
    (tmp_path / "int8").mkdir()
    OnnxInt8().write(artifact.load(kept.folder), batch, tmp_path / "int8")
    held = {tensor.name: tensor for tensor in onnx.load(tmp_path / "int8" / FILE).graph.initializer}
    ((name, table),) = list(packed(kept.model))
    name = name.removesuffix(".table")
    assert np.array_equal(onnx.numpy_helper.to_array(held[f"{name}.codes"]), table.integers().numpy())  # type: ignore[operator]
    assert np.array_equal(onnx.numpy_helper.to_array(held[f"{name}.scale"]), table.scale.numpy())  # type: ignore[operator, union-attr]
    ours, theirs = kept.model(**batch).logits.detach(), OnnxInt8().runner(tmp_path / "int8")(**batch).logits
    off = float((ours - theirs)[batch["attention_mask"].bool()].abs().max())
    assert 0 < off < 0.1 * float(ours.abs().max())


@pytest.mark.parametrize(
    ("family", "task", "stages"),
    [("t5", "classification", []), ("bart", "classification", []),
     ("bert", "masked_lm", [Factorized(rank=16), Embeddings(bits=8, group=8)]),
     ("bert", "masked_lm", [Factorized(rank=16)])],
    ids=["two modules around it", "multiplied", "factors in groups", "factors"],
)  # fmt: skip
def test_a_table_is_8_bits_whoever_reads_it(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, stages: list[Any]
) -> None:
    one = setting(family, task, overrides={"scale_embedding": True} if family == "bart" else {})
    kept = saved(one, tmp_path / "model", *stages)
    batch = one.task.inputs(one.batch())
    (tmp_path / "int8").mkdir()
    OnnxInt8().write(artifact.load(kept.folder), batch, tmp_path / "int8")
    held = onnx.load(tmp_path / "int8" / FILE).graph.initializer
    table = table_of(kept.model).weight.detach()
    codes, _ = to_codes(table, 8)
    (found,) = [tensor for tensor in held if sorted(tensor.dims) == sorted(table.shape)]
    assert np.array_equal(onnx.numpy_helper.to_array(found), codes.numpy().astype(np.int8))
    ours, theirs = kept.model(**batch).logits.detach(), OnnxInt8().runner(tmp_path / "int8")(**batch).logits
    off = float((ours - theirs)[batch["attention_mask"].bool() if task == "masked_lm" else ...].abs().max())
    assert 0 < off < 0.1 * float(ours.abs().max())


@pytest.mark.parametrize("tuning", [LoRA(rank=4, merge=False), QLoRA(rank=4, block=16), Houlsby(merge=False)])
def test_adapters_beside_the_base(setting: Callable[..., Any], tmp_path: Path, tuning: Any) -> None:
    one = setting()
    kept = saved(one, tmp_path / "model", tuning=tuning)
    batch = one.task.inputs(one.batch())
    (tmp_path / "int8").mkdir()
    OnnxInt8().write(artifact.load(kept.folder), batch, tmp_path / "int8")
    merged = artifact.load_merged(kept.folder).model
    nodes = onnx.load(tmp_path / "int8" / FILE).graph.node
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == len(Anatomy.of(merged).linears())
    ours, theirs = kept.model(**batch).logits.detach(), OnnxInt8().runner(tmp_path / "int8")(**batch).logits
    assert 0 < float((ours - theirs).abs().max()) < 0.1 * float(ours.abs().max())


def test_onnx_runtime_makes_one_kernel_of_them(tmp_path: Path) -> None:
    """What the exported nodes are chosen for."""
    linear = integers(8, None, 8)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    import onnx_ir as ir

    onnxruntime.InferenceSession(
        ir.serde.serialize_model(lowered(linear, kernels="dynamic")).SerializeToString(), options
    )
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds == ["DynamicQuantizeMatMul"]


def test_a_tolerance_below_zero() -> None:
    with pytest.raises(ConfigError, match=r"^export\.onnx_int8\.tolerance=-1\.0: needs a number of at least 0$"):
        OnnxInt8(tolerance=-1.0)
