"""Adapters beside their base: PEFT reads the folder, the base is as it was, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import FourierFTConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, VeraConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file

from niwaki import artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ArtifactError, ConfigError
from niwaki.model.load import Pretrained
from niwaki.stage import refuse_conflicts
from niwaki.tuning import beside, delta
from niwaki.tuning.lora import LoRA

pytestmark = pytest.mark.filterwarnings(  # of PEFT, where it wraps a model
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
KINDS = [(family, task) for family in ("bert", "llama") for task in ("classification", "ner", "causal_lm")]
TARGETS = ["query", "value", "intermediate.dense"]
CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=TARGETS),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
    "loha": LoHaConfig(r=2, target_modules=TARGETS),
    "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "oft": OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "vera": VeraConfig(r=2, target_modules=["query", "value"]),
    "fourierft": FourierFTConfig(n_frequency=20, target_modules=TARGETS),
}


def draw(model: Any, seed: int = 1) -> None:
    """Move everything that learns, as a fit would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def save(one: Any, folder: Path, edits: list[Any], base_config: dict[str, Any]) -> None:
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits,
    )  # fmt: skip


def tuned(one: Any, folder: Path, tuning: Any = None, seed: int = 1) -> Any:
    """The model, tuned and saved with its adapter beside it."""
    tuning = tuning or LoRA(rank=4, merge=False)
    context, base_config = one.context(), one.model.config.to_dict()
    tuning.prepare(one.model, context)
    draw(one.model, seed)
    save(one, folder, tuning.finalize(one.model, context), base_config)
    return one


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_peft_reads_the_folder_and_says_the_same(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str
) -> None:
    one = tuned(setting(family, task), tmp_path / "model")
    base = getattr(transformers, one.task.auto_class).from_pretrained(tmp_path / "model")
    assert torch.equal(one.logits(base), setting(family, task).logits())
    read = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert float((one.logits(read) - one.logits()).abs().max()) <= 1e-6
    assert float((one.logits(read) - setting(family, task).logits()).abs().max()) > 0.01


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_base_is_as_it_was_and_the_head_is_the_adapters(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str
) -> None:
    one = tuned(setting(family, task), tmp_path / "model")
    stored = load_file(tmp_path / "model" / artifact.WEIGHTS)
    fresh = artifact.unique_tensors(setting(family, task).model)
    assert set(stored) == set(fresh)
    assert all(torch.equal(stored[name], tensor) for name, tensor in fresh.items())
    adapter = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    head = {name for name in adapter if "lora_" not in name}
    own = setting(family, task).context()
    new = {id(p) for p in own.anatomy.head_parameters().values()} if own.head_learns else set()
    assert head == {f"base_model.model.{n}" for n, p in own.anatomy.model.named_parameters() if id(p) in new}
    assert all(not torch.equal(adapter[name], fresh[name.removeprefix("base_model.model.")]) for name in head)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_artifact_says_the_same(setting: Callable[..., Any], tmp_path: Path, family: str, task: str) -> None:
    one = tuned(setting(family, task), tmp_path / "model")
    torch.manual_seed(99)
    back = artifact.load(tmp_path / "model")
    assert torch.equal(one.logits(back.model), one.logits())
    alone = artifact.load(tmp_path / "model", base_alone=True)
    assert torch.equal(one.logits(alone.model), setting(family, task).logits())


@pytest.mark.filterwarnings("ignore:Specified to not")  # PEFT's, where it reads VeRA
@pytest.mark.parametrize("kind", CONFIGS)
def test_any_injected_adapter(
    setting: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def by_class(model: Any, config: Any) -> None:
        PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name="default")

    monkeypatch.setattr(delta, "inject", by_class)  # PEFT's own function refuses VeRA
    one = setting()
    context, base_config = one.context(), one.model.config.to_dict()
    delta.inject(one.model, CONFIGS[kind])
    one.model.classifier.requires_grad_(True)
    beside.remember(one.model, context)
    assert set(context.kept) == {"classifier.weight", "classifier.bias"}
    draw(one.model)
    save(one, tmp_path / "model", beside.leave(one.model, context), base_config)
    assert torch.equal(one.logits(artifact.load(tmp_path / "model").model), one.logits())
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(one.logits(base), setting().logits())
    read = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert float((one.logits(read) - one.logits()).abs().max()) <= 1e-6
