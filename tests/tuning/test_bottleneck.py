"""What every bottleneck adapter is held to: settings, the edit, other methods, counts, and starting anew from one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from niwaki import artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.qat import QAT
from niwaki.edits import from_json
from niwaki.errors import ArtifactError, ConfigError
from niwaki.measure.size import count, macs
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import KeepBlocks, Pretrained
from niwaki.model.teacher import load_teacher
from niwaki.stage import refuse_conflicts
from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.adapter_parallel import Parallel
from niwaki.tuning.adapter_pfeiffer import Pfeiffer
from niwaki.tuning.bottleneck import AddBottlenecks, edits_of, ends, remove
from niwaki.weights import fold

TUNINGS = [Houlsby(size=8), Pfeiffer(size=8), Parallel(size=8), Parallel(size=8, beside="attention")]
KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "classification"), ("llama", "causal_lm")]
every_tuning = pytest.mark.parametrize("tuning", TUNINGS, ids=lambda t: f"{t.name}-{t.parts[0]}")
every_kind = pytest.mark.parametrize(("family", "task"), KINDS)


@pytest.mark.parametrize("kind", [Houlsby, Pfeiffer, Parallel])
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"size": 0}, "size"), ({"size": None}, "size"), ({"reduction": 2}, "reduction"),
        ({"size": None, "reduction": 0}, "reduction"), ({"activation": "geluu"}, "activation"),
        ({"init_std": -1.0}, "init_std"), ({"dropout": 1.0}, "dropout"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(kind: Any, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tuning\.{name}=") as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


def test_a_reduction_below_one_is_refused(setting: Callable[..., Any]) -> None:
    anatomy = Anatomy.of(setting().model)
    assert Houlsby(size=None, reduction=32).width(anatomy) == 1
    with pytest.raises(ConfigError, match=r"^tuning\.reduction=33: needs at most the model's width, 32"):
        Houlsby(size=None, reduction=33).grow(anatomy.model, anatomy)


@every_tuning
def test_one_ranking_over_all_layers_is_refused_by_both_names(tuning: Any) -> None:
    refuse_conflicts([tuning, Magnitude(), QAT()])
    refuse_conflicts([tuning, Int8()])
    with pytest.raises(ConfigError, match=rf"^tuning={tuning.name} and prune/magnitude with scope=global: bottlenecks"):
        refuse_conflicts([tuning, Magnitude(scope="global")])


@every_tuning
@pytest.mark.parametrize("stage", [Magnitude(pattern="3:7"), QAT(group=7)], ids=lambda s: s.name)
def test_a_size_that_a_pattern_does_not_divide_is_seen_on_the_empty_model(tuning: Any, stage: Any) -> None:
    from dataclasses import replace

    from niwaki.model.tiny import Tiny
    from niwaki.task.classification import Classification

    for size, width, refused in ((14, 56, False), (15, 56, True)):
        changes = {"hidden_size": width, "intermediate_size": 56, "num_attention_heads": 4}
        anatomy = Anatomy.of(Tiny(overrides=changes).empty(Classification(), ("a", "b")))
        replace(tuning, size=size).grow(anatomy.model, anatomy)
        assert all(p.is_meta for p in anatomy.model.parameters())
        if refused:
            with pytest.raises(ConfigError, match=r"adapter\.default\.up has 15 inputs"):
                stage.check(anatomy, anatomy.linears())
        else:
            stage.check(anatomy, anatomy.linears())


@every_tuning
@every_kind
def test_the_edit_rebuilds_the_structure(
    setting: Callable[..., Any], grown: Any, tuning: Any, family: str, task: str
) -> None:
    one, fresh = setting(family, task), setting(family, task, seed=1)
    grown(one, tuning, random=True)
    (edit,) = edits_of(one.model).values()
    again = from_json(json.loads(json.dumps(edit.to_json())))
    assert again == edit
    again.apply(fresh.model)
    fresh.model.load_state_dict(one.model.state_dict())
    assert torch.equal(fresh.logits(), one.logits())
    with pytest.raises(ValueError, match="'default' already"):
        again.apply(fresh.model)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "x"},
        {"parts": ["query"]},
        {"reads": "y"},
        {"size": 0},
        {"size": "8"},
        {"more": 1},
        {"scale": None},
        {"dropout": 1.0},
    ],
)
def test_an_edit_that_nobody_wrote(change: dict[str, Any]) -> None:
    edit = AddBottlenecks(
        adapter="a", parts=["output"], reads="output", size=8, activation="gelu", scale=1.0, dropout=0.0
    )
    with pytest.raises(ArtifactError) as caught:
        from_json(edit.to_json() | change)
    assert "\n" not in str(caught.value)


@every_tuning
@every_kind
def test_taken_out_the_model_is_the_base(
    setting: Callable[..., Any], grown: Any, tuning: Any, family: str, task: str
) -> None:
    one, base = setting(family, task), setting(family, task)
    grown(one, tuning, random=True)
    assert not torch.allclose(one.logits(), base.logits(), atol=1e-3)
    remove(one.model, "default")
    assert torch.equal(one.logits(), base.logits())
    assert list(one.model.state_dict()) == list(base.model.state_dict())
    assert not list(ends(one.model))


@every_tuning
def test_a_copy_is_whole_and_its_own(setting: Callable[..., Any], grown: Any, tuning: Any) -> None:
    one = setting()
    grown(one, tuning, random=True)
    before = one.logits()
    twin = copy.deepcopy(one.model)
    for parameter in one.model.parameters():
        parameter.data.zero_()
    assert torch.equal(one.logits(twin), before)


@every_tuning
@every_kind
def test_counts_and_multiply_adds_include_them(
    setting: Callable[..., Any], grown: Any, tuning: Any, family: str, task: str
) -> None:
    one = setting(family, task)
    inputs = one.task.inputs(one.batch())
    tokens = inputs["input_ids"].numel()
    before, work = count(one.model)["parameters"], macs(one.model, inputs)
    grown(one, tuning)
    number = 3 * len(tuning.parts)
    assert count(one.model)["parameters"] - before == number * (2 * 8 * 32 + 32 + 8)
    assert macs(one.model, inputs) - work == number * tokens * 2 * 8 * 32


def trained(one: Any, tuning: Any, grown: Any, *stages: Any) -> tuple[Any, list[Any]]:
    """The model with shaken bottlenecks, compressed; and its edits."""
    context = grown(one, tuning, random=True)
    edits: list[Any] = list(edits_of(one.model).values())
    for stage in stages:
        stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    for stage in stages:
        edits += stage.finalize(one.model, context)
    return context, edits


def save(one: Any, folder: Path, edits: list[Any], base_config: Any) -> Path:
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits,
    )  # fmt: skip
    return folder


@every_tuning
@every_kind
def test_integers_in_base_and_bottlenecks_come_back(
    setting: Callable[..., Any], grown: Any, tmp_path: Path, tuning: Any, family: str, task: str
) -> None:
    one = setting(family, task)
    base_config = one.model.config.to_dict()
    context, edits = trained(one, tuning, grown, Magnitude(pattern="2:4"), QAT(bits=4, group=8))
    assert all(isinstance(one.model.get_submodule(name), IntegerLinear) for name in context.targets)
    assert sum(".adapter.default." in name for name in context.targets) == 3 * 2 * len(tuning.parts)
    back = artifact.load(save(one, tmp_path / "model", edits, base_config)).model
    assert torch.equal(one.logits(back), one.logits())
    for name in context.targets:
        assert bool((back.get_submodule(name).dequantized().reshape(-1, 4).ne(0).sum(1) <= 2).all())


@every_tuning
@every_kind
@pytest.mark.parametrize("integers", [False, True], ids=["dense", "int8"])
def test_the_start_of_another_run_keeps_them(
    setting: Callable[..., Any], grown: Any, tmp_path: Path, tuning: Any, family: str, task: str, integers: bool
) -> None:
    one = setting(family, task)
    base_config = one.model.config.to_dict()
    _, edits = trained(one, tuning, grown, *([Int8()] if integers else []))
    start = Pretrained(name=str(save(one, tmp_path / "model", edits, base_config)))
    again = start.load(one.task, one.labels, seed=5)
    assert all(type(m) is not IntegerLinear for m in again.modules())
    moved, lost = (float((one.logits(again) - x.logits()).abs().max()) for x in (one, setting(family, task)))
    assert moved <= (0.1 * lost if integers else 0)  # activations are no longer rounded
    assert lost > 1e-3
    assert [type(edit) for edit in start.carried()] == [AddBottlenecks]
    empty = start.empty(one.task, one.labels)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in again.state_dict().items()}


def test_another_task_starts_from_them_too(setting: Callable[..., Any], grown: Any, tmp_path: Path) -> None:
    one, other = setting(), setting(task="ner")
    base_config = one.model.config.to_dict()
    _, edits = trained(one, Houlsby(size=8), grown)
    start = Pretrained(name=str(save(one, tmp_path / "model", edits, base_config)))
    again = start.load(other.task, other.labels, seed=5)
    states = [m.bert.encoder.state_dict() for m in (again, one.model)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_second_adapter_stands_on_the_first_after_a_cut(
    setting: Callable[..., Any], grown: Any, tmp_path: Path
) -> None:
    """Tuned; cut to two of three blocks and tuned again; started from that: each generation loads as it was saved."""
    one = setting()
    base_config = one.model.config.to_dict()
    _, edits = trained(one, Parallel(size=8), grown)
    first = Pretrained(name=str(save(one, tmp_path / "first", edits, base_config)), layers=[2, 0])
    one.model = first.load(one.task, one.labels, seed=5)
    base_config = one.model.config.to_dict()
    edits = first.cut(one.model)
    grown(one, Houlsby(size=4), random=True)
    assert list(edits_of(one.model)) == ["default", "default_2"]
    learning = [n for n, p in one.model.named_parameters() if p.requires_grad]
    assert not any(".adapter.default." in n for n in learning)
    assert any(".adapter.default_2." in n for n in learning)
    edits.append(edits_of(one.model)["default_2"])
    assert [type(edit) for edit in edits] == [AddBottlenecks, KeepBlocks, AddBottlenecks]
    second = save(one, tmp_path / "second", edits, base_config)
    assert torch.equal(one.logits(artifact.load(second).model), one.logits())
    third = Pretrained(name=str(second)).load(one.task, one.labels, seed=5)
    assert torch.equal(one.logits(third), one.logits())


def test_weights_without_a_place_are_refused(
    setting: Callable[..., Any], grown: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    one = setting()
    base_config = one.model.config.to_dict()
    _, edits = trained(one, Houlsby(size=8), grown)
    start = Pretrained(name=str(save(one, tmp_path / "model", edits, base_config)))
    monkeypatch.setattr(AddBottlenecks, "carried", False)
    with pytest.raises(ArtifactError, match=r"holds bert\.encoder\.layer\.0\..*has no place for") as caught:
        start.load(one.task, one.labels, seed=5)
    assert "\n" not in str(caught.value)


@every_tuning
def test_as_a_teacher(setting: Callable[..., Any], grown: Any, tmp_path: Path, tuning: Any) -> None:
    one = setting()
    base_config = one.model.config.to_dict()
    _, edits = trained(one, tuning, grown)
    folder = save(one, tmp_path / "model", edits, base_config)
    teacher = load_teacher(str(folder), one.task, one.labels, one.tokenizer.get_vocab(), "field")
    assert torch.equal(one.logits(teacher), one.logits())


def test_every_linear_of_the_blocks_is_a_target_once(setting: Callable[..., Any], grown: Any) -> None:
    one = setting("llama", "causal_lm")
    grown(one, Parallel(size=4))
    anatomy = Anatomy.of(one.model)
    inside = [m for block in anatomy.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    found = anatomy.linears()
    assert {id(linear) for linear in found.values()} == {id(m) for m in inside}
    assert len(found) == len(inside) == 3 * (7 + 2)
    assert anatomy.places("feed_out") == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert anatomy.places("feed_norm") == [f"model.layers.{i}.post_attention_layernorm" for i in range(3)]
    assert Anatomy.of(setting("bert").model).places("feed_gate") == []
