"""Pruning of the residual width: importance by hand, what stays, and that it is really gone in the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import live, recipe_of, write_rows
from torch import Tensor

from niwaki import artifact
from niwaki.combinations import names
from niwaki.compression.prune.importance import measure_channels
from niwaki.compression.prune.width import Width
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.stream import stream_of
from niwaki.model.tiny import FAMILIES


def test_magnitude_by_hand(setting: Callable[..., Any]) -> None:
    """Everything at a channel of a BERT, spelled out."""
    model = setting("bert").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    scores = measure_channels(model, stream_of(Anatomy.of(model)), "magnitude", 1, None)  # type: ignore[arg-type]
    channel, squares = 7, 0.0
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, weight in weights.items():
        if "embeddings." in name and "LayerNorm" not in name:
            squares += float((weight[:, channel] ** 2).sum())
        if name.endswith("output.dense.weight"):  # of attention and feed-forward
            squares += float((weight[channel] ** 2).sum() + weights[name.replace("weight", "bias")][channel] ** 2)
        reads = ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight", "pooler.dense.weight")
        if name.endswith(reads):
            squares += float((weight[:, channel] ** 2).sum())
    assert float(scores[channel]) == pytest.approx(squares**0.5, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_activation_and_taylor_by_plain_loops(setting: Callable[..., Any], family: str) -> None:
    """The mean |a| over the text and the norms; |sum over norms and tokens of a dL/da| of each text, a mean."""
    one = setting(family)
    model, context = one.model.eval(), one.context()
    stream = stream_of(Anatomy.of(model))
    total, count = torch.zeros(stream.width, dtype=torch.float64), 0
    terms: list[Tensor] = []
    for batch in context.calibration(12):
        seen: list[Tensor] = []

        def keep(module: Any, args: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            output.retain_grad()
            seen.append(output)

        hooks = [model.get_submodule(name).register_forward_hook(keep) for name in stream.norms]
        context.loss(model, batch).backward()
        for hook in hooks:
            hook.remove()
        texts, mask = len(batch["input_ids"]), batch["attention_mask"]
        for output in seen:
            text = mask.bool() if mask.shape == output.shape[:2] else torch.ones(output.shape[:2], dtype=torch.bool)
            total += output.detach().double().abs()[text].sum(0)
            count += int(text.sum())
        for row in range(texts):
            each = sum((a.detach()[row] * a.grad[row]).sum(0).double() for a in seen if a.grad is not None)
            terms.append((each * texts).abs())  # type: ignore[union-attr, operator]
    found = {kind: measure_channels(model, stream, kind, 12, context) for kind in ("activation", "taylor")}
    torch.testing.assert_close(found["activation"], total / count, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["taylor"], torch.stack(terms).mean(0), rtol=1e-3, atol=1e-7)


def test_the_least_important_go(setting: Callable[..., Any]) -> None:
    one = setting("bert")
    table = one.model.bert.embeddings.word_embeddings.weight
    dear = [1, 4, 9, 16, 25]
    with torch.no_grad():
        table[:, dear] *= 1000.0
    stays = table.detach()[:, dear].clone()
    context = one.context()
    effects = Width(keep=5).prepare(one.model, context)
    assert context.facts["kept_channels"] == dear
    assert torch.equal(one.model.bert.embeddings.word_embeddings.weight, stays)
    assert [edit.to_json()["kept"] for edit in effects.edits] == [5]
    assert one.model.bert.embeddings.LayerNorm.normalized_shape == (5,)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ratio": 1.0}, r"width\.ratio=1\.0: needs a number above 0 and below 1"),
        ({"ratio": 0.5, "keep": 3}, r"width\.ratio=0\.5: has no effect beside compression\.width\.keep"),
        ({"keep": 0}, r"width\.keep=0: needs a whole number of at least 1"),
        ({"importance": "size"}, r"width\.importance='size': needs magnitude, taylor or activation"),
        ({"importance": "taylor", "calibration": 0}, r"width\.calibration=0: needs null or a whole number"),
        ({"calibration": 8}, r"width\.calibration=8: has no effect with importance=magnitude"),
        ({"ratio": 0.99}, r"width\.ratio=0\.99: leaves none of the 32 channels; needs one that keeps 1 to 31"),
        ({"ratio": 0.01}, r"width\.ratio=0\.01: has no effect on the 32 channels"),
        ({"keep": 32}, r"width\.keep=32: has no effect on the 32 channels"),
    ],
)
def test_bad_settings(setting: Callable[..., Any], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Width(**fields).check(Anatomy.of(setting("bert").model), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_reloads(family: str, tmp_path: Path) -> None:
    files = write_rows(tmp_path, 12)
    settings = ["compression=[prune/width,prune/heads]", "compression.width.importance=activation"]
    recipe = recipe_of("classification", files["classification"], f"model=tiny-{family}", *settings)
    saved = artifact.load(live(recipe, tmp_path / "run"))
    assert stream_of(Anatomy.of(saved.model)).width == 16


@pytest.mark.parametrize("tuning", [name for name in names("tuning") if name not in ("full", "lora")])
def test_every_tuning_of_a_narrower_model(tuning: str, tmp_path: Path) -> None:
    files = write_rows(tmp_path, 12)
    settings = ["tuning.block=16"] if tuning == "oft" else []  # which has to divide the inputs
    chosen = [f"tuning={tuning}", "compression=prune/width", *settings]
    live(recipe_of("classification", files["classification"], *chosen), tmp_path / "run")


def test_another_run_goes_on_from_the_narrower_model(tmp_path: Path) -> None:
    files = write_rows(tmp_path, 12)
    first = recipe_of("classification", files["classification"], "compression=prune/width")
    live(first, tmp_path / "first")
    again = recipe_of(
        "ner", files["ner"], f"model.name={tmp_path}/first/model", "model=pretrained", "compression=prune/width"
    )
    saved = artifact.load(live(again, tmp_path / "second"))
    assert stream_of(Anatomy.of(saved.model)).width == 8


def test_a_model_that_has_adapters_becomes_narrower_with_them(tmp_path: Path) -> None:
    files = write_rows(tmp_path, 12)
    live(recipe_of("classification", files["classification"], "tuning=adapter"), tmp_path / "first")
    settings = [f"model.name={tmp_path}/first/model", "model=pretrained", "compression=prune/width"]
    saved = artifact.load(live(recipe_of("classification", files["classification"], *settings), tmp_path / "second"))
    dense = saved.model.bert.encoder.layer[0].output.dense
    assert dense.linear.out_features == dense.adapter["default"].up.out_features == 16
