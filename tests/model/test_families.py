"""Every family: its linears are found whole, and every task that it can do runs from the config to the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from niwaki import artifact, compose, inference, pipeline
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import PARTS, Anatomy, adapt, known_families
from niwaki.model.load import KeepBlocks, has_head
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.task.causal_lm import CausalLM
from niwaki.task.classification import Classification
from niwaki.task.masked_lm import MaskedLM
from niwaki.task.ner import NER
from niwaki.task.translation import Translation

TASKS = {
    "classification": Classification(), "ner": NER(), "causal_lm": CausalLM(), "masked_lm": MaskedLM(),
    "translation": Translation(),
}  # fmt: skip
ENCODERS = {"bert", "roberta", "electra"}  # that transformers would run as decoders, were they trained for it
HEADS = [
    (family, name)
    for family in FAMILIES
    for name, task in TASKS.items()
    if has_head(task, Tiny(name=family).config())
    and (family, name) not in {("bart", "masked_lm"), *((encoder, "translation") for encoder in ENCODERS)}
]
KINDS = [(family, task) for family, task in HEADS if task != "causal_lm" or family not in ENCODERS]
NO_HEAD = [
    (family, task) for family in FAMILIES for task in TASKS if (family, task) not in HEADS and task != "masked_lm"
]
FIRST_STAYS = ["modernbert", "t5"]
GATED = {"llama", "qwen2", "qwen3", "modernbert"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows for each task."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [f"a {colour} rose, {number}" for number in range(4) for colour in ("red", "blue", "white")]
    rows: dict[str, list[dict[str, Any]]] = {
        "classification": [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(texts)],
        "ner": [{"tokens": text.split(), "tags": ["O", "B-COLOUR", "O", "O"]} for text in texts],
        "causal_lm": [{"text": text} for text in texts],
        "translation": [{"source": text, "target": text[::-1]} for text in texts],
        "masked_lm": [{"text": text} for text in texts],
    }
    for task, found in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return {task: folder / f"{task}.jsonl" for task in rows}


def build(model: str, task: str, file: Path, *overrides: str) -> tuple[Any, dict[str, Any]]:
    """The recipe and its config, for two steps on the rows of `file`."""
    data = [f"data.{split}={file}" for split in ("train", "validation", "test")]
    settings = [f"task={task}", f"model=tiny-{model}", "data=files", *data, "data.batch_size=4", "task.max_length=32"]
    settings += ["trainer=debug", "trainer.max_steps=2", "trainer.precision=fp32", "optimizer.lr=1e-2", "logger=none"]
    config = compose.compose([*settings, "callbacks=[]", "measure.repeats=1", *overrides]).config
    return compose.build(config), config


def test_every_family_has_a_tiny_model() -> None:
    assert set(known_families()) == set(FAMILIES)
    assert {f"tiny-{family}" for family in FAMILIES} <= set(compose.options_of("model"))


@pytest.mark.parametrize(("family", "task"), HEADS)
def test_no_linear_of_a_block_is_missed(setting: Callable[..., Any], family: str, task: str) -> None:
    anatomy = Anatomy.of(setting(family, task).model)
    inside = [id(m) for block in anatomy.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    found = anatomy.linears()
    assert sorted(id(linear) for linear in found.values()) == sorted(inside)
    assert all(anatomy.model.get_submodule(name) is linear for name, linear in found.items())
    assert anatomy.part_names(PARTS) == list(found)
    for stack in anatomy.stacks:
        for block in anatomy.blocks_of(stack):
            for name in (stack.attention, stack.attention_norm, stack.feed_norm):
                block.get_submodule(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_played(setting: Callable[..., Any], family: str) -> None:
    anatomy = Anatomy.of(setting(family).model)
    blocks = len(anatomy.blocks)
    for part in PARTS:
        played = len(anatomy.part_names([part]))
        assert played >= blocks if part != "feed_gate" or family in GATED else played == 0, part


@pytest.mark.parametrize(
    ("family", "task", "tuning"),
    [(*kind, tuning) for kind in KINDS for tuning in ("full", "lora") if (kind[1], tuning) != ("masked_lm", "full")],
)
def test_from_config_to_artifact(family: str, task: str, tuning: str, files: dict[str, Path], tmp_path: Path) -> None:
    compression = "compression=[prune/magnitude,quantize/int8]"
    recipe, config = build(family, task, files[task], f"tuning={tuning}", compression)
    metrics = pipeline.run(recipe, tmp_path, config)
    assert metrics["steps"] == 2
    assert metrics["parity"] == 0
    assert all(metrics[side]["macs"] > 0 and metrics[side]["latency_ms"] > 0 for side in ("before", "after"))
    saved = artifact.load(tmp_path / "model")
    dense = recipe.model.load(recipe.task, saved.labels, 0)
    assert list(metrics["targets"]) == list(Anatomy.of(dense).linears())
    for name, row in metrics["targets"].items():
        assert isinstance(saved.model.get_submodule(name), IntegerLinear)
        assert row["bits"] == 8
        assert row["sparsity"] >= 0.5
    texts = ["a red rose[MASK]", "b [MASK]"]
    column = "source" if task == "translation" else "text"
    found = list(inference.answers(saved, [{column: text} for text in texts], 2))
    assert [row[column] for row in found] == texts


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_every_parameter_has_a_gradient(setting: Callable[..., Any], family: str, task: str) -> None:
    one = setting(family, task)
    batch = one.batch()
    one.task.loss(one.model(**one.task.inputs(batch)), batch).backward()
    assert all(torch.isfinite(p.grad).all() for p in one.model.parameters())
    assert not {name for name, p in one.model.named_parameters() if not p.grad.any()}


def keepable(family: str) -> list[int]:
    """Two of the blocks of each stack, in another order where that is allowed."""
    return [0, 2] if family in FIRST_STAYS else [2, 0]


@pytest.mark.parametrize(("family", "task"), [kind for kind in KINDS if kind[0] != "albert"])
def test_kept_blocks_reload(setting: Callable[..., Any], family: str, task: str, tmp_path: Path) -> None:
    one = setting(family, task)
    base_config = one.model.config.to_dict()
    edit = KeepBlocks(blocks=keepable(family))
    anatomy = Anatomy.of(one.model)
    stacks = [anatomy.blocks_of(stack) for stack in anatomy.stacks]
    edit.apply(one.model)
    kept = [anatomy.blocks_of(stack) for stack in anatomy.stacks]
    assert kept == [[blocks[i] for i in edit.blocks] for blocks in stacks]
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=[*adapt(one.model), edit],
    )  # fmt: skip
    expected = one.logits()
    assert torch.equal(one.logits(artifact.load(tmp_path / "model").model), expected)
    plain = getattr(transformers, one.task.auto_class_of(one.model.config)).from_pretrained(tmp_path / "model")
    assert torch.equal(one.logits(plain), expected)


@pytest.mark.parametrize("family", FIRST_STAYS)
def test_a_first_block_that_has_to_stay(setting: Callable[..., Any], family: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.layers=\[1, 2\]: needs 0 as the first, since block 0 of a "):
        Anatomy.of(setting(family).model).keep_blocks([1, 2])


@pytest.mark.parametrize(("family", "task"), NO_HEAD)
def test_a_task_that_the_family_has_no_head_for(
    family: str, task: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, config = build(family, task, files[task])
    monkeypatch.setattr(type(recipe.model), "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        ConfigError, match=rf"^task={task}: (transformers has no {family} model|needs .* {family})"
    ) as said:
        pipeline.run(recipe, tmp_path, config)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_an_encoder_writes_no_text(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    recipe, config = build(family, "causal_lm", files["causal_lm"])
    with pytest.raises(ConfigError, match=rf"^task=causal_lm: needs a model that reads from .* and {family} sees"):
        pipeline.run(recipe, tmp_path, config)
