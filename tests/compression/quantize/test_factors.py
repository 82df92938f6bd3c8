"""Factors that went into what comes before: the same function, nothing left to multiply at run time, and no place is
taken that something else reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import saved
from lifecycle import check_in_a_fresh_process, live, recipe_of, write_rows
from safetensors import safe_open
from torch import Tensor, nn

from niwaki import artifact
from niwaki.compression.quantize.awq import AWQ
from niwaki.compression.quantize.factors import Place, place_before
from niwaki.compression.quantize.smoothquant import SmoothQuant
from niwaki.compression.share.layers import Layers
from niwaki.model.anatomy import Anatomy
from niwaki.tuning.adapter_parallel import Parallel
from niwaki.tuning.layernorm import LayerNorm
from niwaki.tuning.prefix import PrefixTuning
from niwaki.weights import fold, packed

METHODS = {"smoothquant": SmoothQuant, "awq": AWQ}
SETTINGS: dict[str, dict[str, Any]] = {"smoothquant": {}, "awq": {"group": 8}}
ATTENTION = {"query", "key", "value"}
# By family, the parts whose factor stays one of the run. GELU passes no factors on, ReLU (T5) and gates do.
STAY = {
    "bert": ATTENTION | {"feed_in", "feed_out"},  # the residual stream reads what the norms give
    "albert": ATTENTION | {"feed_in", "feed_out"},
    "gpt2": {"feed_out"},
    "llama": {"output"},  # two query heads share a value head
    "qwen3": {"output"},  # a norm of each key head stands behind the linear, and passes none on
    "modernbert": ATTENTION,  # of block 0, which has no norm there
    "t5": {"key", "value"},  # of cross attention, which reads the encoder
}
EACH_ITS_OWN = {"overrides": {"num_key_value_heads": 4}}  # a value head for each of four query heads
TASKS = {"bert": "classification", "albert": "ner", "modernbert": "classification", "t5": "translation"}


SEEDS = {"t5": 3}  # of which no activation lies between two codes


def uneven(setting: Callable[..., Any], family: str, **fields: Any) -> Any:
    """A model whose norms and biases are those of no fresh one."""
    one = setting(family, TASKS.get(family, "causal_lm"), SEEDS.get(family, 0), **fields)
    with torch.no_grad():
        for parameter in one.model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return one


def at_run_time(monkeypatch: pytest.MonkeyPatch, kind: type) -> type:
    """The method with the factors that it would fold, which stay with the linears."""

    def quantize(stage: Any, linears: Any, statistic: Any, context: Any) -> None:
        factor = stage.factor(linears, statistic)
        stage.put(linears, statistic, factor, context, at_run_time=True)

    return type("AtRunTime", (kind,), {"quantize": quantize, "__module__": kind.__module__})


def factored(one: Any, stage: Any) -> tuple[set[str], Tensor]:
    """The names of the linears whose factor stays with them, and the logits, of integers."""
    context = one.context()
    stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    kept = {name for name, module in packed(one.model) if module.factor is not None}  # type: ignore[attr-defined]
    return kept, one.logits()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to float order; an activation may fall on the neighbouring code."""
    off = (found - expected).abs().amax(-1) / expected.abs().max().clamp(min=1.0)
    assert float(off.median()) <= 1e-5
    assert float(off.max()) <= 0.01


@pytest.mark.parametrize("family", STAY)
@pytest.mark.parametrize("method", METHODS)
def test_folded_factors_are_the_same_function(
    method: str, family: str, setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = uneven(setting, family)
    plain = one.logits()
    kept, found = factored(one, METHODS[method](**SETTINGS[method]))
    parts = one.context().anatomy
    assert {part for name in kept for part in parts.parts_of(name)} == STAY[family]
    other = uneven(setting, family)
    everything, expected = factored(other, at_run_time(monkeypatch, METHODS[method])(**SETTINGS[method]))
    assert everything == {name for name, _ in packed(one.model)}
    assert_same(found, expected)
    assert float((found - plain).abs().max()) > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("method", METHODS)
def test_heads_that_share_nothing_have_the_factors_that_they_had(
    method: str, family: str, setting: Callable[..., Any]
) -> None:
    fields = EACH_ITS_OWN if family == "llama" else {}
    found = [factored(uneven(setting, family, **fields), METHODS[method](fold=fold, **SETTINGS[method]))
             for fold in (True, False)]  # fmt: skip
    assert len(found[0][0]) < len(found[1][0])
    assert_same(found[0][1], found[1][1])


def test_rows_of_values_by_hand(setting: Callable[..., Any]) -> None:
    """8 heads of 8 channels: each input of the output comes from the value of its own number; where heads share their
    values, it would come from one that others come from too."""
    for heads in (8, 2):
        one = setting("llama", "causal_lm", overrides={"num_attention_heads": 8, "num_key_value_heads": heads})
        context = one.context()
        AWQ(group=8, targets=["value"], fold=False).prepare(one.model, context)
        name = next(name for name in context.targets if name.endswith("o_proj"))
        place = place_before(context, {name: context.targets[name]})
        assert (place is None) == (heads == 2)
        assert place is None or place.source.tolist() == list(range(64))


def test_norms_and_rows_take_the_factors(setting: Callable[..., Any]) -> None:
    one = uneven(setting, "llama", **EACH_ITS_OWN)
    plain = uneven(setting, "llama", **EACH_ITS_OWN).model
    context = one.context()
    stage = SmoothQuant()
    chosen: dict[str, Tensor] = {}

    class Noted(SmoothQuant):
        def factor(self, linears: Any, statistic: Any) -> Tensor:
            found = super().factor(linears, statistic)
            chosen.update(dict.fromkeys(linears, found))
            return found

    Noted.__module__ = type(stage).__module__
    Noted().prepare(one.model, context)
    for index in range(3):
        block, before = one.model.model.layers[index], plain.model.layers[index]
        for norm, linear in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj")):
            expected = before.get_submodule(norm).weight * chosen[f"model.layers.{index}.{linear}"]
            torch.testing.assert_close(block.get_submodule(norm).weight, expected)
        down = chosen[f"model.layers.{index}.mlp.down_proj"]
        torch.testing.assert_close(block.mlp.up_proj.bias, before.mlp.up_proj.bias * down)
        torch.testing.assert_close(block.mlp.gate_proj.bias, before.mlp.gate_proj.bias)
        values = chosen[f"model.layers.{index}.self_attn.o_proj"]
        torch.testing.assert_close(block.self_attn.v_proj.bias, before.self_attn.v_proj.bias * values)


def test_an_artifact_of_a_llama_has_no_factors(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = uneven(setting, "llama", **EACH_ITS_OWN)
    fresh = saved(one, tmp_path / "model", AWQ(group=8))
    (file,) = (tmp_path / "model").glob("*.safetensors")
    with safe_open(file, framework="pt") as stored:
        assert not [name for name in stored.keys() if "factor" in name]  # noqa: SIM118
    edits = json.loads((tmp_path / "model" / "niwaki.json").read_text())["edits"]
    assert [edit["factored"] for edit in edits if "factored" in edit] == [[]]
    assert torch.equal(one.logits(fresh.model), one.logits())
    dense = artifact.load_merged(tmp_path / "model").model
    torch.testing.assert_close(one.logits(dense), one.logits(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_onnx(method: str, family: str, setting: Callable[..., Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from niwaki.export.onnx import FILE, Onnx
    from niwaki.export.runner import made_exact

    fields = EACH_ITS_OWN if family == "llama" else {}
    one = (
        setting("t5", "ner") if family == "t5" else uneven(setting, family, **fields)
    )  # what writes texts is not exported
    fresh = saved(one, tmp_path / "model", METHODS[method](**SETTINGS[method]))
    expected = one.logits(fresh.model)
    given = one.task.inputs(one.batch())
    (tmp_path / "exported").mkdir()
    Onnx(cache=False).write(fresh, given, tmp_path / "exported")
    session = onnxruntime.InferenceSession(tmp_path / "exported" / FILE, made_exact(onnxruntime.SessionOptions()))
    found = torch.from_numpy(session.run(["logits"], {name: tensor.numpy() for name, tensor in given.items()})[0])
    assert_same(found, expected)
    import onnx

    held = [each.name for each in onnx.load(tmp_path / "exported" / FILE).graph.initializer]
    assert bool([name for name in held if name.endswith(".factor")]) == (family == "bert")


class Offset(nn.Module):
    """x (1 + w), as some families have it."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach() - 1)

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def offset(one: Any) -> None:
    one.model.model.layers[1].input_layernorm = Offset(one.model.model.layers[1].input_layernorm)


def shared_norm(one: Any) -> None:
    layers = one.model.model.layers
    layers[1].input_layernorm.weight = layers[2].input_layernorm.weight


def to_the_stream(one: Any) -> None:
    """What the norm gives is added to what the block gives."""
    block, seen = one.model.model.layers[1], []
    block.input_layernorm.register_forward_hook(lambda _, __, output: seen.append(output))
    block.register_forward_hook(lambda _, __, output: output + seen.pop())


@pytest.mark.parametrize("plant", [offset, shared_norm, to_the_stream])
@pytest.mark.parametrize("method", METHODS)
def test_a_norm_that_more_depends_on_is_left_alone(
    method: str, plant: Callable[[Any], None], setting: Callable[..., Any]
) -> None:
    one, other = (uneven(setting, "llama", **EACH_ITS_OWN) for _ in range(2))
    plant(one), plant(other)
    before = one.model.model.layers[1].input_layernorm.weight.detach().clone()
    kept, found = factored(one, METHODS[method](**SETTINGS[method]))
    blocks = {1, 2} if plant is shared_norm else {1}
    assert kept == {f"model.layers.{i}.self_attn.{n}_proj" for i in blocks for n in "qkv"}
    assert torch.equal(one.model.model.layers[1].input_layernorm.weight, before)
    assert_same(found, factored(other, at_run_time(None, METHODS[method])(**SETTINGS[method]))[1])  # type: ignore[arg-type]


def test_a_wrong_anatomy_is_found_out(setting: Callable[..., Any]) -> None:
    """A BERT that is said to have its norms before the sublayers."""
    one = uneven(setting, "bert")
    context = one.context()
    said = dataclasses.replace(context.anatomy.family, post_norm=False)
    anatomy = Anatomy(one.model, said)
    assert anatomy.norm_before("bert.encoder.layer.0.intermediate.dense") is not None
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    for part in ("query", "feed_in"):
        names = anatomy.part_names([part])[:1]
        asked = dataclasses.replace(context, anatomy=anatomy)
        assert place_before(asked, {name: context.targets[name] for name in names}) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.model.state_dict().items())


def test_linears_that_are_not_quantized_read_it_too(setting: Callable[..., Any]) -> None:
    one = uneven(setting, "llama")
    kept, _ = factored(one, AWQ(group=8, targets=["query", "key", "feed_in", "feed_gate", "output"]))
    assert {name.rpartition(".")[2] for name in kept} == {"q_proj", "k_proj", "o_proj"}


@pytest.mark.parametrize("tuning", [LayerNorm(), PrefixTuning(), Parallel()], ids=lambda tuning: tuning.name)
@pytest.mark.parametrize("method", METHODS)
def test_with_what_a_tuning_left(method: str, tuning: Any, setting: Callable[..., Any], tmp_path: Path) -> None:
    """Norms that learn, prefixes beside the values, adapters that read the norm too."""
    found = []
    for fold_them in (True, False):
        one = uneven(setting, "llama", overrides={"num_key_value_heads": 4})
        torch.manual_seed(1)
        fresh = saved(
            one, tmp_path / str(fold_them), METHODS[method](fold=fold_them, **SETTINGS[method]), tuning=tuning
        )
        kept = {name for name, module in packed(fresh.model) if module.factor is not None}  # type: ignore[attr-defined]
        found.append((one.logits(fresh.model), kept))
    assert_same(found[0][0], found[1][0])
    assert {name.rpartition(".")[2] for name in found[0][1]} == {
        "layernorm": set(),
        "prefix": {"o_proj"},  # what it puts beside the values does not come from their rows
        "adapter_parallel": {"gate_proj", "linear", "down", "up"},  # beside the feed-forward
    }[tuning.name]


def test_blocks_that_run_twice(setting: Callable[..., Any]) -> None:
    found = []
    for fold_them in (True, False):
        one = uneven(setting, "llama", overrides={"num_key_value_heads": 4})
        Layers(lists=[[0, 1]]).prepare(one.model, one.context())
        found.append(factored(one, AWQ(group=8, fold=fold_them)))
    assert [len(kept) for kept, _ in found] == [0, 14]
    assert_same(found[0][1], found[1][1])


RUNS = {
    "cut": [
        "compression=[prune/neurons,prune/heads,quantize/smoothquant]", "tuning=lora", "compression.neurons.ratio=0.25",
        "compression.neurons.schedule=cubic", "compression.neurons.interval=1", "compression.neurons.importance=taylor",
        "compression.heads.ratio=0.5", "compression.heads.schedule=cubic", "compression.heads.interval=1",
        "compression.heads.importance=taylor",
    ],
    "cut_bert": [
        "compression=[prune/neurons,quantize/smoothquant]", "compression.neurons.ratio=0.25",
        "compression.neurons.schedule=cubic", "compression.neurons.interval=1",
    ],
    "merged": ["compression=[prune/magnitude,quantize/awq]", "tuning=lora", "compression.magnitude.sparsity=0.5"],
    "norms": ["compression=[quantize/awq]", "tuning=layernorm", "optimizer.lr=0.1"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_runs(name: str, tmp_path: Path) -> None:
    """Units that are cut after the fit, adapters that are merged below a mask, norms that have learned: what is folded,
    saved and loaded in another process says what the chains said."""
    method = "smoothquant" if name.startswith("cut") else "awq"
    task = "classification" if name == "cut_bert" else "causal_lm"
    path = write_rows(tmp_path)[task]
    folder = live(recipe_of(task, path, *RUNS[name], f"compression.{method}.rows=8"), tmp_path / "run")
    found: dict[str, Any] = dict(packed(artifact.load(folder).model))
    kept = {each: module.factor for each, module in found.items() if module.factor is not None}
    assert len(found) == (18 if name == "cut_bert" else 21)
    assert len(kept) == (15 if name == "cut_bert" else 3)
    if name.startswith("cut"):
        ends = [each for each in found if each.endswith(("down_proj", ".output.dense")) and "attention" not in each]
        assert [found[each].in_features for each in ends] == [48] * 3
        assert all(len(factor) == found[each].in_features for each, factor in kept.items())
    if name == "merged":
        assert all(float((module.dequantized() == 0).float().mean()) >= 0.5 for module in found.values())
    check_in_a_fresh_process([folder])


def test_a_place_shares_out_by_its_source() -> None:
    weight, bias = torch.ones(3, 2), torch.ones(3)
    place = Place([weight, bias], torch.tensor([2, 2, 0]))
    place.multiply(torch.tensor([5.0, 5.0, 7.0]))
    assert bias.tolist() == [7.0, 1.0, 5.0]
    assert weight.tolist() == [[7.0, 7.0], [1.0, 1.0], [5.0, 5.0]]
