"""GPT-2's Conv1D as linears: the same function, in files that transformers reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from niwaki import artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy, adapt
from niwaki.model.families.gpt2 import TransposedLinear, UseLinears
from niwaki.model.load import Pretrained
from niwaki.tuning.lora import LoRA
from niwaki.weights import fold

TASKS = ["classification", "ner", "causal_lm"]
SQUARE = "transformer.h.1.attn.c_proj"


@pytest.fixture
def theirs(setting: Callable[..., Any], tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    """`theirs(task)`: a setting with transformers' own model, none of its tensors symmetric, and its folder."""

    def make(task: str) -> tuple[Any, Path]:
        one = setting("gpt2", task)
        one.model = getattr(transformers, one.task.auto_class_of(one.model.config)).from_config(one.model.config).eval()
        one.model.save_pretrained(tmp_path / "theirs")
        one.tokenizer.save_pretrained(tmp_path / "theirs")
        return one, tmp_path / "theirs"

    return make


def save(one: Any, folder: Path, *edits: Any) -> Path:
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=one.model.config.to_dict(), edits=[UseLinears(), *edits],
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_loaded_model_computes_what_transformers_does(theirs: Callable[..., Any], task: str) -> None:
    one, folder = theirs(task)
    ours = Pretrained(name=str(folder)).load(one.task, one.labels, 0)
    assert any(isinstance(module, Conv1D) for module in one.model.modules())
    assert not any(isinstance(module, Conv1D) for module in ours.modules())
    assert torch.allclose(one.logits(ours), one.logits(), atol=1e-6, rtol=0)
    for name, linear in Anatomy.of(ours).linears().items():
        assert torch.equal(linear.weight, one.model.get_submodule(name).weight.t())
        assert linear.weight.shape == (linear.out_features, linear.in_features)


def test_the_change_takes_no_random_numbers_and_is_made_once(theirs: Callable[..., Any]) -> None:
    one, _ = theirs("causal_lm")
    state = torch.get_rng_state()
    assert adapt(one.model) == [UseLinears()]
    assert torch.equal(torch.get_rng_state(), state)
    linears = Anatomy.of(one.model).linears()
    adapt(one.model)
    assert Anatomy.of(one.model).linears() == linears
    assert not any(p.requires_grad is False for p in one.model.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_transformers_reads_what_a_tuned_and_pruned_run_leaves(
    theirs: Callable[..., Any], train: Callable[..., Any], tmp_path: Path, task: str
) -> None:
    one, folder = theirs(task)
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    one.model = Pretrained(name=str(folder)).load(one.task, one.labels, 0)
    before = one.logits()
    context, tuning, pruning = one.context(), LoRA(rank=2), Magnitude(sparsity=0.5)
    tuning.prepare(one.model, context)
    tuning.link(one.model, context)
    effects = pruning.prepare(one.model, context)
    train(one.learner(effects=[effects]), [one.batch()] * 2)
    context.records.update(fold(context.targets))
    edits = [*tuning.finalize(one.model, context), *pruning.finalize(one.model, context)]
    saved = save(one, tmp_path / "model", *edits)
    expected = one.logits()
    assert not torch.allclose(expected, before, atol=1e-3)
    assert torch.equal(one.logits(artifact.load(saved).model), expected)
    assert {name: tensor.shape for name, tensor in load_file(saved / "model.safetensors").items()} == shapes
    plain = getattr(transformers, one.task.auto_class_of(one.model.config)).from_pretrained(saved)
    assert isinstance(plain.get_submodule(SQUARE), Conv1D)
    assert torch.allclose(one.logits(plain), expected, atol=1e-6, rtol=0)
    assert all(
        int((plain.get_submodule(n).weight == 0).sum()) * 2 >= t.weight.numel() for n, t in context.targets.items()
    )


def test_a_checkpoint_under_links_comes_back(setting: Callable[..., Any]) -> None:
    models = []
    for seed in (0, 1):
        one = setting("gpt2", "causal_lm", seed=seed)
        Magnitude(sparsity=0.5).prepare(one.model, one.context())
        models.append(one)
    first, second = models
    state = first.model.state_dict()
    original = state[f"{SQUARE}.parametrizations.weight.original"]
    assert torch.equal(original, first.model.get_submodule(SQUARE).parametrizations["weight"].original)
    assert not torch.equal(second.logits(), first.logits())
    second.model.load_state_dict(state)
    assert torch.equal(second.logits(), first.logits())


@pytest.mark.parametrize("quantized", [False, True])
def test_an_artifact_as_the_start_of_another_training(
    setting: Callable[..., Any], tmp_path: Path, quantized: bool
) -> None:
    one = setting("gpt2")
    edits = []
    if quantized:
        context, stage = one.context(), Int8()
        stage.prepare(one.model, context)
        context.records.update(fold(context.targets))
        edits = stage.finalize(one.model, context)
    square = one.model.get_submodule(SQUARE)
    assert isinstance(square, IntegerLinear if quantized else TransposedLinear)
    weight = square.dequantized() if quantized else square.weight
    for labels in (one.labels, ("a", "b")):
        again = Pretrained(name=str(save(one, tmp_path / "model", *edits))).load(one.task, labels, 3)
        assert isinstance(again.get_submodule(SQUARE), TransposedLinear)
        assert torch.equal(again.get_submodule(SQUARE).weight, weight)
        assert not torch.equal(weight, weight.t())


def test_blocks_that_are_scaled_by_their_place(setting: Callable[..., Any]) -> None:
    one = setting("gpt2", overrides={"scale_attn_by_inverse_layer_idx": True})
    with pytest.raises(ConfigError, match=r"^model\.layers=\[0, 2\]: each block of this gpt2 is scaled by its place"):
        Anatomy.of(one.model).keep_blocks([0, 2])
