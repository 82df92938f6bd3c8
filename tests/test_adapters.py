"""Several adapters on one base: the right one is put on, and what was made for another base is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from niwaki import adapters, artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ArtifactError, ConfigError
from niwaki.model.anatomy import Anatomy, adapt
from niwaki.stage import refuse_conflicts
from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.adapter_parallel import Parallel
from niwaki.tuning.adapter_pfeiffer import Pfeiffer
from niwaki.tuning.full import Full
from niwaki.tuning.lora import LoRA
from niwaki.tuning.qlora import QLoRA


def draw(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def saved(one: Any, folder: Path, tuning: Any, seed: int = 1, head: int = 0) -> Any:
    """The model of `one`, its new head drawn with `head`, tuned with `seed` and saved."""
    torch.manual_seed(head)
    if one.labels:
        torch.nn.init.normal_(one.model.classifier.weight)
    base_config = one.model.config.to_dict()
    grown = tuning.grow(one.model, Anatomy.of(one.model))
    context = one.context()
    tuning.prepare(one.model, context)
    draw(one.model, seed)
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=[*grown, *tuning.finalize(one.model, context)],
    )  # fmt: skip
    return one


def refused(folder: Path, adapter: object) -> str:
    with pytest.raises(ArtifactError) as caught:
        adapters.load_with(folder, str(adapter))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [LoRA, QLoRA])
@pytest.mark.parametrize("place", ["model", "run", "adapter", "alone"])
def test_another_adapter_on_the_same_base(setting: Callable[..., Any], tmp_path: Path, kind: Any, place: str) -> None:
    first = saved(setting(), tmp_path / "first", kind(merge=False))
    second = saved(setting(), tmp_path / "run" / "model", kind(rank=3, parts=["query"], merge=False), seed=2, head=7)
    model = tmp_path / "run" / "model"
    shutil.copytree(model / "adapter", tmp_path / "alone")
    places = {"model": model, "run": tmp_path / "run", "adapter": model / "adapter", "alone": tmp_path / "alone"}
    found = adapters.load_with(tmp_path / "first", str(places[place]))
    assert torch.equal(first.logits(found.model), second.logits())
    assert not torch.equal(first.logits(), second.logits())
    assert not found.model.training
    assert torch.equal(first.logits(artifact.load(tmp_path / "first").model), first.logits())


BOTTLENECKS = [Houlsby(size=4, merge=False), Pfeiffer(size=4, merge=False), Parallel(size=4, merge=False)]


@pytest.mark.parametrize("tuning", BOTTLENECKS, ids=lambda tuning: tuning.name)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_bottlenecks_beside_a_base_that_is_as_it_was(
    setting: Callable[..., Any], tmp_path: Path, family: str, tuning: Any
) -> None:
    task = "causal_lm" if family == "llama" else "classification"
    fresh = setting(family, task)
    stored = artifact.unique_tensors(fresh.model)
    one = setting(family, task)
    one.model.load_state_dict(fresh.model.state_dict())
    base_config = one.model.config.to_dict()
    assert tuning.grow(one.model, Anatomy.of(one.model)) == []
    context = one.context()
    tuning.prepare(one.model, context)
    draw(one.model, 1)
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=[*adapt(one.model), *tuning.finalize(one.model, context)],
    )  # fmt: skip
    found = load_file(tmp_path / "model" / artifact.WEIGHTS)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
    back = artifact.load(tmp_path / "model")
    assert torch.equal(one.logits(back.model), one.logits())
    alone = artifact.load(tmp_path / "model", base_alone=True)
    assert torch.equal(one.logits(alone.model), fresh.logits())
    assert not torch.allclose(fresh.logits(), one.logits(), atol=1e-3)
    with pytest.raises(ArtifactError, match="start from the model that it was tuned from"):
        artifact.load_dense(str(tmp_path / "model"), one.task, one.labels, one.model.config)


@pytest.mark.parametrize("place", ["model", "run", "adapter", "alone"])
def test_bottlenecks_and_adapters_of_peft_take_turns(setting: Callable[..., Any], tmp_path: Path, place: str) -> None:
    first = saved(setting(), tmp_path / "first", LoRA(merge=False))
    second = saved(setting(), tmp_path / "run" / "model", BOTTLENECKS[0], seed=2, head=7)
    model = tmp_path / "run" / "model"
    shutil.copytree(model / "adapter", tmp_path / "alone")
    places = {"model": model, "run": tmp_path / "run", "adapter": model / "adapter", "alone": tmp_path / "alone"}
    found = adapters.load_with(tmp_path / "first", str(places[place]))
    assert torch.equal(first.logits(found.model), second.logits())
    back = adapters.load_with(model, str(tmp_path / "first"))
    assert torch.equal(first.logits(back.model), first.logits())
    adapters.add(tmp_path / "first", str(places[place]), "narrow")
    assert torch.equal(first.logits(adapters.load_with(tmp_path / "first", "narrow").model), second.logits())


def test_bottlenecks_of_another_base_are_refused(setting: Callable[..., Any], tmp_path: Path) -> None:
    saved(setting(), tmp_path / "ours", BOTTLENECKS[1])
    saved(setting(seed=1), tmp_path / "theirs", BOTTLENECKS[1])
    message = "was trained on another base; the weights of this one are not the same"
    assert refused(tmp_path / "ours", tmp_path / "theirs").endswith(message)


def test_bottlenecks_on_bottlenecks_are_not_kept_apart(setting: Callable[..., Any]) -> None:
    one = setting()
    anatomy = Anatomy.of(one.model)
    Pfeiffer(size=4).grow(one.model, anatomy)
    with pytest.raises(ConfigError, match=r"^tuning.merge=false: the model has bottlenecks of an earlier tuning"):
        BOTTLENECKS[1].grow(one.model, anatomy)


@pytest.mark.parametrize("weight", [Magnitude(), QAT()])
def test_bottlenecks_beside_their_base_and_weight_methods_are_refused(weight: Any) -> None:
    with pytest.raises(ConfigError, match=rf"tuning=adapter with tuning.merge=false and {weight.name}: "):
        refuse_conflicts([BOTTLENECKS[0], weight])


def test_its_own_by_name_and_none(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = saved(setting(), tmp_path / "model", LoRA(merge=False))
    assert torch.equal(one.logits(adapters.load_with(tmp_path / "model", "adapter").model), one.logits())
    alone = adapters.load_with(tmp_path / "model", "none").model
    assert torch.equal(one.logits(alone), one.logits(artifact.load(tmp_path / "model", base_alone=True).model))
    assert not torch.equal(one.logits(alone), one.logits())


def test_none_where_there_is_none(setting: Callable[..., Any], tmp_path: Path) -> None:
    saved(setting(), tmp_path / "model", LoRA())
    assert refused(tmp_path / "model", "none").startswith("--adapter none: the artifact")


def test_an_adapter_of_another_base_is_refused(setting: Callable[..., Any], tmp_path: Path) -> None:
    saved(setting(), tmp_path / "ours", LoRA(merge=False))
    saved(setting(seed=1), tmp_path / "theirs", LoRA(merge=False))
    message = "was trained on another base; the weights of this one are not the same"
    assert refused(tmp_path / "ours", tmp_path / "theirs").endswith(message)
    assert refused(tmp_path / "ours", tmp_path / "theirs" / "adapter").endswith(message)
    saved(setting(), tmp_path / "codes", QLoRA())
    assert refused(tmp_path / "codes", tmp_path / "ours").endswith(message)
    saved(setting(overrides={"intermediate_size": 48}), tmp_path / "narrow", LoRA(merge=False))
    assert refused(tmp_path / "ours", tmp_path / "narrow").endswith(message)


def test_an_adapter_of_another_task_or_labels_is_refused(setting: Callable[..., Any], tmp_path: Path) -> None:
    saved(setting(), tmp_path / "ours", LoRA(merge=False))
    saved(setting("bert", "ner"), tmp_path / "tags", LoRA(merge=False))
    assert refused(tmp_path / "ours", tmp_path / "tags").endswith("does the task ner, the base classification")
    other = replace(setting(), labels=("maybe", "nay", "yes"))
    saved(other, tmp_path / "labels", LoRA(merge=False))
    assert refused(tmp_path / "ours", tmp_path / "labels").endswith("are not those of the artifact (nay, no)")
    turned = replace(setting(), labels=("yes", "no", "maybe"))
    saved(turned, tmp_path / "turned", LoRA(merge=False))
    assert refused(tmp_path / "ours", tmp_path / "turned").endswith("(their order)")


def test_places_that_hold_no_adapter(setting: Callable[..., Any], tmp_path: Path) -> None:
    saved(setting(), tmp_path / "ours", LoRA(merge=False))
    saved(setting(), tmp_path / "merged", Full())
    assert refused(tmp_path / "ours", "nowhere") == (
        "--adapter nowhere: no such adapter, nor a folder with adapter_config.json; the artifact holds adapter"
    )
    assert refused(tmp_path / "ours", tmp_path / "merged").endswith("needs a run with tuning.merge=false")


def test_a_damaged_artifact_gives_no_adapter(setting: Callable[..., Any], tmp_path: Path) -> None:
    saved(setting(), tmp_path / "ours", LoRA(merge=False))
    saved(setting(), tmp_path / "theirs", LoRA(merge=False))
    path = tmp_path / "theirs" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for place in (tmp_path / "theirs", tmp_path / "theirs" / "adapter"):
        assert "truncated" in refused(tmp_path / "ours", place)


def test_an_added_adapter_is_part_of_the_artifact(setting: Callable[..., Any], tmp_path: Path) -> None:
    first = saved(setting(), tmp_path / "ours", LoRA(merge=False))
    second = saved(setting(), tmp_path / "theirs", LoRA(rank=3, merge=False), seed=2)
    third = saved(setting(), tmp_path / "third", LoRA(rank=2, merge=False), seed=3)
    assert adapters.add(tmp_path / "ours", str(tmp_path / "theirs"), "second") == tmp_path / "ours" / "second"
    shutil.rmtree(tmp_path / "theirs")
    assert torch.equal(first.logits(adapters.load_with(tmp_path / "ours", "second").model), second.logits())
    assert torch.equal(first.logits(artifact.load(tmp_path / "ours").model), first.logits())
    moved = adapters.load_with(tmp_path / "third", str(tmp_path / "ours" / "second"))
    assert torch.equal(first.logits(moved.model), second.logits())
    assert torch.equal(first.logits(artifact.load(tmp_path / "third").model), third.logits())
    assert "the artifact holds adapter, second" in refused(tmp_path / "ours", "fourth")
    card = json.loads((tmp_path / "ours" / "niwaki.json").read_text())
    assert {"second/adapter_config.json", "second/adapter_model.safetensors"} < set(card["files"])
    weights = tmp_path / "ours" / "second" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "truncated" in refused(tmp_path / "ours", "second")


def test_a_name_that_cannot_be_added(setting: Callable[..., Any], tmp_path: Path) -> None:
    saved(setting(), tmp_path / "ours", LoRA(merge=False))
    saved(setting(), tmp_path / "theirs", LoRA(merge=False), seed=2)
    saved(setting(seed=1), tmp_path / "foreign", LoRA(merge=False))
    before = sorted(path.name for path in (tmp_path / "ours").rglob("*"))
    for name in ("", ".", "..", "none", "a/b", "../out"):
        with pytest.raises(ArtifactError, match="needs a plain name"):
            adapters.add(tmp_path / "ours", str(tmp_path / "theirs"), name)
    for name in ("adapter", "config.json"):
        with pytest.raises(ArtifactError, match="of that name already"):
            adapters.add(tmp_path / "ours", str(tmp_path / "theirs"), name)
    with pytest.raises(ArtifactError, match="trained on another base"):
        adapters.add(tmp_path / "ours", str(tmp_path / "foreign"), "fine")
    assert sorted(path.name for path in (tmp_path / "ours").rglob("*")) == before
    artifact.load(tmp_path / "ours")


def test_a_failed_copy_leaves_the_artifact_as_it_was(
    setting: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(setting(), tmp_path / "ours", LoRA(merge=False))
    saved(setting(), tmp_path / "theirs", LoRA(merge=False), seed=2)
    monkeypatch.setattr(artifact, "stamp", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapters.add(tmp_path / "ours", str(tmp_path / "theirs"), "second")
    assert not (tmp_path / "ours" / "second").exists()
    artifact.load(tmp_path / "ours")
