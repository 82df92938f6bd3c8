"""A folder that from_pretrained reads, or a line that says why there can be none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported import saved
from lifecycle import write_rows

from niwaki import artifact, compose, pipeline
from niwaki.compression.prune.heads import Heads
from niwaki.compression.quantize.awq import AWQ
from niwaki.compression.quantize.embeddings import Embeddings
from niwaki.compression.quantize.hqq import HQQ
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.quantize.weight_only import WeightOnly
from niwaki.compression.share.codebook import CodebookSharing
from niwaki.compression.share.layers import Layers
from niwaki.errors import ConfigError
from niwaki.export.export import FLOAT_ORDER, ExportError
from niwaki.export.exports import Rows, export
from niwaki.export.hf import HuggingFace
from niwaki.model.anatomy import Anatomy
from niwaki.tuning.adapter import Houlsby
from niwaki.weights import packed, repeats


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """On which a model of three labels is judged."""
    path = write_rows(tmp_path)["classification"]
    settings = ["data=files", f"data.train={path}", "model=tiny-bert", "logger=none", "callbacks=[]"]
    return Rows(pipeline.read(compose.build(compose.compose(settings).config)), {"accuracy": 0.0}, 0)


def test_what_is_on_a_grid_is_read_as_the_weights_that_it_stands_for(
    setting: Callable[..., Any], tmp_path: Path, rows: Rows
) -> None:
    kept = saved(setting(), tmp_path / "model", QAT(bits=4, group=16, activation_bits=None))
    found = export(HuggingFace(), kept.folder, tmp_path / "hf", rows)
    assert found["parity"] <= found["bound"] == FLOAT_ORDER
    assert found["runtime"] == f"transformers {transformers.__version__}"
    assert found["bytes"] > 4 * 45_000
    card = json.loads((tmp_path / "hf" / "export.json").read_text())
    model = getattr(transformers, card["class"]).from_pretrained(tmp_path / "hf")
    inputs = rows.corpus.task.inputs(rows.corpus.samples("test", 3, 1)[0])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, kept.model(**inputs).logits, rtol=0, atol=1e-6)


def test_a_block_that_runs_several_times_is_written_as_often(
    setting: Callable[..., Any], tmp_path: Path, rows: Rows
) -> None:
    kept = saved(setting(), tmp_path / "model", Layers())
    assert repeats(kept.model)
    found = export(HuggingFace(), kept.folder, tmp_path / "hf", rows)
    assert found["parity"] <= FLOAT_ORDER


def test_where_inputs_were_rounded_the_scores_count(setting: Callable[..., Any], tmp_path: Path, rows: Rows) -> None:
    kept = saved(setting(), tmp_path / "model", Int8())
    found = export(HuggingFace(), kept.folder, tmp_path / "hf", rows)
    assert found["bound"] is None
    assert found["parity"] > 0
    with pytest.raises(
        ExportError, match=r"^export=hf: test accuracy is .*export\.hf\.tolerance=0\.01 of it may be lost"
    ):
        export(HuggingFace(), kept.folder, tmp_path / "other", replace(rows, scores={"accuracy": 1.0}))
    assert not (tmp_path / "other").exists()


def loaded(folder: Path) -> Any:
    """What transformers alone makes of an export."""
    card = json.loads((folder / "export.json").read_text())
    return getattr(transformers, card["class"]).from_pretrained(folder).eval()


INTEGERS: dict[str, tuple[Any, str]] = {
    "a scale per channel": (QAT(activation_bits=None), "Int8Tensor"),
    "groups": (QAT(bits=4, group=16, activation_bits=None), "Int8Tensor"),
    "groups and factors": (AWQ(bits=4, group=16), "Int8Tensor"),
    "groups and whole zeros": (WeightOnly(bits=4, group=16, symmetric=False), "IntxUnpackedToInt8Tensor"),
    "whole zeros": (WeightOnly(bits=8, group=None, symmetric=False), "IntxUnpackedToInt8Tensor"),
    "real zeros": (HQQ(bits=3, group=16), "IntxUnpackedToInt8Tensor"),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_stay_integers_in_tensors_of_torchao(
    kind: str, setting: Callable[..., Any], tmp_path: Path, rows: Rows
) -> None:
    """The codes and scales are ours, and nobody else draws any."""
    stage, name = INTEGERS[kind]
    kept = saved(setting(), tmp_path / "model", stage)
    found = export(HuggingFace(weights="torchao"), kept.folder, tmp_path / "hf", rows)
    assert found["parity"] <= found["bound"] == FLOAT_ORDER
    model = loaded(tmp_path / "hf")
    linears = dict(packed(kept.model))
    assert len(linears) == 18
    for where, linear in linears.items():
        weight = model.get_submodule(where).weight
        assert type(weight).__name__ == name
        assert torch.equal(weight.qdata, linear.integers())
        assert torch.equal(weight.scale, linear.scale)
    inputs = rows.corpus.task.inputs(rows.corpus.samples("test", 3, 1)[0])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, kept.model(**inputs).logits, rtol=0, atol=1e-6)


def test_embeddings_of_integers_go_out_dense_beside_tensors_of_torchao(
    setting: Callable[..., Any], tmp_path: Path, rows: Rows
) -> None:
    kept = saved(setting(), tmp_path / "model", Embeddings(), WeightOnly(bits=4, group=16))
    found = export(HuggingFace(weights="torchao"), kept.folder, tmp_path / "hf", rows)
    assert found["parity"] <= found["bound"] == FLOAT_ORDER
    model = loaded(tmp_path / "hf")
    assert type(model.bert.embeddings.word_embeddings.weight.data) is torch.Tensor
    assert type(model.bert.encoder.layer[0].output.dense.weight).__name__ == "Int8Tensor"


def test_a_language_model_of_integers_writes_on(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("llama", "causal_lm")
    kept = saved(one, tmp_path / "model", QAT(activation_bits=None))
    (tmp_path / "hf").mkdir()
    card = HuggingFace(weights="torchao").write(artifact.load(kept.folder), {}, tmp_path / "hf")
    model = getattr(transformers, card["class"]).from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, kept.model(ids).logits, rtol=0, atol=1e-6)
        assert torch.equal(
            model.generate(ids, max_new_tokens=4, do_sample=False),
            kept.model.generate(ids, max_new_tokens=4, do_sample=False),
        )


def test_where_inputs_were_rounded_torchao_gets_the_integers_alone(
    setting: Callable[..., Any], tmp_path: Path, rows: Rows
) -> None:
    kept = saved(setting(), tmp_path / "model", Int8())
    found = export(HuggingFace(weights="torchao"), kept.folder, tmp_path / "hf", rows)
    dense = export(HuggingFace(), kept.folder, tmp_path / "dense", rows)
    assert found["bound"] is None
    assert found["parity"] == pytest.approx(dense["parity"], rel=1e-2)
    weights = sum(linear.in_features * linear.out_features for _, linear in packed(kept.model))
    assert found["bytes"] < dense["bytes"] - 2.2 * weights  # of 3 bytes that each saves; scales and names take some


@pytest.mark.parametrize(
    ("stage", "why"),
    [(None, "no linear is on a grid of integers; leave it dense"),
     (CodebookSharing(), r"\S+ holds codebook, and torchao integers"),
     (AWQ(bits=4, group=16, symmetric=False), r"\S+ has zeros and a factor for each input")],
)  # fmt: skip
def test_what_torchao_has_no_tensor_for_is_refused_in_one_line(
    stage: Any, why: str, setting: Callable[..., Any], tmp_path: Path
) -> None:
    kept = saved(setting(), tmp_path / "model", *([stage] if stage else []))
    with pytest.raises(ExportError, match=rf"^weights=torchao: {why}") as caught:
        HuggingFace(weights="torchao").write(kept, {}, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_linear_that_is_none_in_transformers_is_refused_before_the_fit(setting: Callable[..., Any]) -> None:
    one = setting("gpt2", "causal_lm")
    HuggingFace().check(one.task, Anatomy.of(one.model))
    with pytest.raises(ConfigError, match=r"^export\.hf\.weights=torchao: \S+ is no nn\.Linear in .*; needs dense$"):
        HuggingFace(weights="torchao").check(one.task, Anatomy.of(one.model))


TORCHAO = "export.hf.weights=torchao"


@pytest.mark.parametrize(
    ("settings", "why"),
    [([], rf"^{TORCHAO}: no linear is stored as integers; add compression=quantize/weight_only, or leave it dense$"),
     (["compression=quantize/embeddings"], rf"^{TORCHAO}: no linear is stored as integers; add "),
     (["compression=quantize/bf16"], rf"^{TORCHAO} and quantize/bf16: linears are stored as floats, .*; leave"),
     (["compression=share/codebook"], rf"^{TORCHAO}: no linear is stored as integers; add ")],
)  # fmt: skip
def test_runs_that_torchao_has_no_tensors_for_are_refused_before_the_fit(settings: list[str], why: str) -> None:
    asked = ["model=tiny-bert", "export=hf", *settings]
    compose.build(compose.compose(asked).config)
    with pytest.raises(ConfigError, match=why):
        compose.build(compose.compose([*asked, TORCHAO]).config)


@pytest.mark.parametrize(
    ("compression", "settings", "what"),
    [("prune/heads", ["heads.scope=global"], "sublayers of different widths"),
     ("prune/neurons", ["neurons.scope=global"], "sublayers of different widths"),
     ("prune/heads", ["heads.keep=[1,2]", "heads.schedule=cubic"], "sublayers of different widths"),
     ("prune/cofi", [], "sublayers of different widths"),
     ("factorize/svd", ["svd.energy=0.9"], "linears that are a product of two")],
)  # fmt: skip
def test_what_no_config_tells_of_is_refused_before_the_fit(compression: str, settings: list[str], what: str) -> None:
    asked = ["model=tiny-bert", f"compression={compression}", *(f"compression.{one}" for one in settings)]
    compose.build(compose.compose(asked).config)
    with pytest.raises(ConfigError, match=rf"^export=hf and {compression}: there will be {what}, and no config of "):
        compose.build(compose.compose([*asked, "export=hf"]).config)


@pytest.mark.parametrize(
    "settings",
    [["prune/magnitude", "magnitude.scope=global"], ["prune/heads", "heads.schedule=cubic"],
     ["prune/heads", "heads.keep=[1,1]", "heads.schedule=cubic"], ["factorize/svd", "svd.rank=4"],
     ["quantize/int8"]],
    ids=str,
)  # fmt: skip
def test_what_a_config_may_tell_of_is_not(settings: list[str]) -> None:
    asked = [f"compression={settings[0]}", *(f"compression.{one}" for one in settings[1:])]
    compose.build(compose.compose(["model=tiny-bert", "export=hf", *asked]).config)


def test_layers_that_a_plain_model_lacks_are_refused_before_the_fit(setting: Callable[..., Any]) -> None:
    one = setting()
    HuggingFace().check(one.task, Anatomy.of(one.model))
    Houlsby(size=4).grow(one.model, one.context().anatomy)
    with pytest.raises(ConfigError, match=r"^export=hf: \S+ is not what a plain bert has there") as caught:
        HuggingFace().check(one.task, Anatomy.of(one.model))
    assert "\n" not in str(caught.value)


def test_sizes_that_a_config_has_no_words_for_are_refused_in_one_line(
    setting: Callable[..., Any], tmp_path: Path, rows: Rows
) -> None:
    kept = saved(setting(), tmp_path / "model", Heads(keep=[1, 3, 2]))
    with pytest.raises(ExportError, match=r"^export=hf: \S+ is not what a plain bert has there") as caught:
        export(HuggingFace(), kept.folder, tmp_path / "hf", rows)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"model"}
    assert artifact.load(kept.folder)
