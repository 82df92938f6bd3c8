"""Adapters beside their base: PEFT reads the folder, the base is as it was, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
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
from niwaki.stage import refuse_conflicts
from niwaki.tuning import beside, delta
from niwaki.tuning.adalora import AdaLoRA
from niwaki.tuning.dora import DoRA
from niwaki.tuning.fourierft import FourierFT
from niwaki.tuning.hra import HRA
from niwaki.tuning.ia3 import IA3
from niwaki.tuning.loha import LoHa
from niwaki.tuning.lokr import LoKr
from niwaki.tuning.lora import LoRA
from niwaki.tuning.oft import OFT
from niwaki.tuning.peft_tuning import PeftTuning
from niwaki.tuning.vera import VeRA
from niwaki.weights import fold

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
    base = getattr(transformers, one.task.auto_class_of(one.model.config)).from_pretrained(tmp_path / "model")
    assert torch.equal(one.logits(base), setting(family, task).logits())
    read = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert float((one.logits(read) - one.logits()).abs().max()) <= 1e-6
    assert float((one.logits(read) - setting(family, task).logits()).abs().max()) > 0.01


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_base_is_as_it_was_and_the_head_is_the_adapters(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str
) -> None:
    tuned(setting(family, task), tmp_path / "model")
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


SMALL = [
    LoRA(rank=2, merge=False),
    DoRA(rank=2, merge=False),
    AdaLoRA(rank=4, target_rank=2, merge=False),
    VeRA(rank=2, merge=False),
    LoHa(rank=2, merge=False),
    LoKr(rank=2, merge=False),
    FourierFT(frequencies=20, merge=False),
    IA3(merge=False),
    OFT(block=8, merge=False),
    HRA(rank=2, merge=False),
]


@pytest.mark.filterwarnings("ignore:Specified to not")  # PEFT's, where it reads VeRA
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("tuning", SMALL, ids=lambda one: one.name)
def test_every_tuning_of_peft_stays_beside_its_base(
    setting: Callable[..., Any], tmp_path: Path, tuning: PeftTuning, family: str
) -> None:
    one = setting(family)
    context, base_config = one.context(), one.model.config.to_dict()
    tuning.prepare(one.model, context)
    draw(one.model)
    for name, parameter in one.model.named_parameters():
        if ".lora_E." in name:  # as if AdaLoRA had masked a rank
            parameter.data[0] = 0
    one.model.eval()
    before = one.logits()
    save(one, tmp_path / "model", tuning.finalize(one.model, context), base_config)
    assert torch.equal(one.logits(artifact.load(tmp_path / "model").model), before)
    base = getattr(transformers, one.task.auto_class_of(one.model.config)).from_pretrained(tmp_path / "model")
    read = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert float((one.logits(read) - before).abs().max()) <= 1e-6


@pytest.mark.filterwarnings("ignore:Specified to not")  # PEFT's, where it reads VeRA
@pytest.mark.parametrize(
    ("tuning", "seed"),
    [(VeRA(rank=2, merge=False), "projection_prng_key"), (FourierFT(frequencies=20, merge=False), "random_loc_seed")],
)
def test_other_numbers_from_the_seed_are_noticed(
    setting: Callable[..., Any], tmp_path: Path, tuning: PeftTuning, seed: str
) -> None:
    one = setting()
    context, base_config = one.context(), one.model.config.to_dict()
    tuning.prepare(one.model, context)
    save(one, tmp_path / "model", tuning.finalize(one.model, context), base_config)
    path = tmp_path / "model" / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {seed: settings[seed] + 1}))  # as if this machine drew others
    with pytest.raises(ArtifactError, match="what it draws from its seed came out different"):
        beside.put_on(setting().model, path.parent)


def test_ranks_that_adalora_dropped_stay_dropped(
    setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    one = setting()
    context, base_config = one.context(steps=6), one.model.config.to_dict()
    tuning = AdaLoRA(rank=4, target_rank=2, interval=1, merge=False)
    effects = tuning.prepare(one.model, context)
    train(one.learner(effects=[effects], steps=6), [one.batch()] * 6, callbacks=effects.callbacks)
    before = one.logits()
    save(one, tmp_path / "model", tuning.finalize(one.model, context), base_config)
    assert context.facts["ranks"]["sum"] == context.facts["ranks"]["budget"]
    back = artifact.load(tmp_path / "model").model
    assert torch.equal(one.logits(back), before)
    assert sum(int(layer.lora_E["default"].count_nonzero()) for _, layer in delta.adapters(back)) == 2 * 18  # type: ignore[index, union-attr, operator, misc]
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    read = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert float((one.logits(read) - before).abs().max()) <= 1e-6


def test_a_start_out_of_the_base_is_merged() -> None:
    with pytest.raises(ConfigError, match=r"^tuning\.init=pissa: takes its start out of the base"):
        LoRA(init="pissa", merge=False)


def test_what_learned_beside_the_adapters_is_remembered_once(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    LoRA(merge=False).prepare(one.model, context)
    head = {n for n, p in one.model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert set(context.kept) == head == {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    merged = setting()
    context = merged.context()
    LoRA().prepare(merged.model, context)
    assert context.kept == {}


@pytest.mark.parametrize("weight", [Magnitude(), QAT(), Int8()], ids=lambda stage: stage.name)
def test_weight_methods_are_refused_by_both_names(weight: Any) -> None:
    refuse_conflicts([LoRA(), weight])
    with pytest.raises(ConfigError) as caught:
        refuse_conflicts([LoRA(merge=False), weight])
    assert str(caught.value).startswith(
        f"tuning=lora with tuning.merge=false and {weight.name}: masks and grids act on"
    )
    assert "\n" not in str(caught.value)


def test_the_config_is_of_no_machine_and_starts_plain(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    one.model.config._name_or_path = str(tmp_path)
    one.model.config.hidden_act = "gelu"
    context, base_config = one.context(), one.model.config.to_dict()
    delta.inject(one.model, LoraConfig(r=2, init_lora_weights="pissa", target_modules=TARGETS))
    draw(one.model)
    save(one, tmp_path / "model", beside.leave(one.model, context), base_config)
    settings = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None
    assert settings["inference_mode"] is True
    assert torch.equal(one.logits(artifact.load(tmp_path / "model").model), one.logits())


@pytest.fixture
def adapter(setting: Callable[..., Any], tmp_path: Path) -> Path:
    """The folder of an adapter for the tiny BERT's classification, alone."""
    tuned(setting(), tmp_path / "model")
    return Path(shutil.copytree(tmp_path / "model" / "adapter", tmp_path / "alone"))


def refused(model: Any, folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        beside.put_on(model, folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"adapter {folder}: ")
    return str(caught.value)


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_plain_folder_of_peft_goes_on(setting: Callable[..., Any], tmp_path: Path) -> None:
    from peft import get_peft_model

    other = setting()
    targets = ["query", "output.dense"]
    read = get_peft_model(other.model, LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"]))
    draw(read)
    read.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    one = setting()
    beside.put_on(one.model, tmp_path / "theirs")
    assert float((one.logits() - other.logits(read)).abs().max()) <= 1e-6
    assert not any(p.requires_grad for p in one.model.parameters())
    assert not any("modules_to_save" in name for name, _ in one.model.named_modules())


def test_a_base_of_other_shapes_is_refused(setting: Callable[..., Any], adapter: Path) -> None:
    narrow = setting(overrides={"intermediate_size": 48})
    assert "does not fit this base: bert.encoder.layer.0.intermediate.dense.lora_B.weight is" in refused(
        narrow.model, adapter
    )
    labels = setting()
    labels.model.classifier = torch.nn.Linear(32, 5)
    assert "classifier.bias is (3,), not (5,)" in refused(labels.model, adapter)
    assert "for another task: this base has no bert.pooler" in refused(setting("bert", "ner").model, adapter)
    assert "this base has no bert.pooler" in refused(setting("llama").model, adapter)
    head_alone = setting("llama", "causal_lm")
    change(adapter, modules_to_save=None)
    assert "cannot be put on this base (" in refused(head_alone.model, adapter)


def test_a_base_with_fewer_blocks_is_refused(setting: Callable[..., Any], adapter: Path) -> None:
    flatter = setting(overrides={"num_hidden_layers": 2})
    assert "no place for, bert.encoder.layer.2." in refused(flatter.model, adapter)


def test_a_base_of_integers_is_refused(setting: Callable[..., Any], adapter: Path) -> None:
    one, stage = setting(), Int8()
    context = one.context()
    stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    assert "cannot be put on this base (" in refused(one.model, adapter)


def test_a_base_of_another_name_is_refused(setting: Callable[..., Any], adapter: Path) -> None:
    one = setting()
    one.model.config._name_or_path = "some/base"
    change(adapter, base_model_name_or_path="another/base")
    assert refused(one.model, adapter).endswith("was made for the base another/base, this one is some/base")
    change(adapter, base_model_name_or_path="some/base")
    beside.put_on(one.model, adapter)


def test_a_folder_that_is_none(setting: Callable[..., Any], adapter: Path) -> None:
    one = setting()
    state = load_file(adapter / "adapter_model.safetensors")
    first = sorted(name for name in state if "lora_" in name)[0]
    save_file({n: t for n, t in state.items() if n != first}, adapter / "adapter_model.safetensors")
    assert f"lacks {first.removeprefix('base_model.model.')}" in refused(one.model, adapter)
    save_file(state | {"base_model.model.bert.odd": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    assert "no place for, bert.odd" in refused(setting().model, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    assert "needs adapter_model.safetensors" in refused(setting().model, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "needs adapter_model.safetensors" in refused(setting().model, adapter)
    for text in ("", "[]", "{}", '{"peft_type": "os.system"}', '{"peft_type": "LORA", "no_such": 1}'):
        (adapter / "adapter_config.json").write_text(text)
        assert "needs adapter_config.json" in refused(setting().model, adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}')
    assert "PROMPT_TUNING does not stand on layers" in refused(setting().model, adapter)


def test_a_module_that_a_config_names_is_not_imported(setting: Callable[..., Any], adapter: Path) -> None:
    change(adapter, megatron_config={"a": 1}, megatron_core="antigravity_of_nobody")
    beside.put_on(setting().model, adapter)
