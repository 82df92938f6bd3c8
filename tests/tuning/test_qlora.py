"""QLoRA: a base that really is in 4 bits, gradients through it, an artifact of codes with its adapter beside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from niwaki import artifact
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ArtifactError, ConfigError
from niwaki.measure.size import count, held_bytes
from niwaki.model.load import Pretrained
from niwaki.stage import refuse_conflicts
from niwaki.tuning.lora import LoRA
from niwaki.tuning.normal_float import NormalFloatLinear
from niwaki.tuning.qlora import QLoRA

KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "causal_lm"), ("t5", "classification")]
WEIGHTS = 3 * (4 * 32 * 32 + 2 * 32 * 64)  # of the blocks of the tiny BERT


def draw(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def tuned(one: Any, folder: Path, **fields: Any) -> Any:
    """The model, tuned and saved; `one.trained`: its logits before `finalize`."""
    tuning = QLoRA(**({"rank": 4} | fields))
    context, base_config = one.context(), one.model.config.to_dict()
    tuning.prepare(one.model, context)
    draw(one.model)
    one.trained = one.logits()
    edits = tuning.finalize(one.model, context)
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits,
    )  # fmt: skip
    return one


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4 + 8 / 64)])
def test_the_base_in_memory_is_in_four_bits(setting: Callable[..., Any], double: bool, bits: float) -> None:
    one = setting()
    context, dense = one.context(), held_bytes(one.model)
    QLoRA(rank=1, parts=["query"], double_quantization=double).prepare(one.model, context)
    layers = [m for m in one.model.modules() if isinstance(m, NormalFloatLinear)]
    assert len(layers) == 18 == len(context.targets)
    assert {id(layer) for layer in layers} == {id(linear) for linear in context.targets.values()}
    adapters = sum(p.numel() * 4 for n, p in one.model.named_parameters() if "lora_" in n)
    rest = 18 * (4 + 4) if double else 0  # mean, and the one scale of so few scales
    assert held_bytes(one.model) == dense - WEIGHTS * 4 + WEIGHTS * bits / 8 + rest + adapters
    assert not [t for t in one.model.state_dict().values() if t.numel() == 32 * 64 and t.is_floating_point()]


def test_the_dense_weights_are_freed(setting: Callable[..., Any]) -> None:
    import gc
    import weakref

    one = setting()
    context = one.context()
    alive = [weakref.ref(linear.weight) for linear in context.targets.values()]
    QLoRA().prepare(one.model, context)
    gc.collect()
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_it_is_lora_on_the_dequantized_base(setting: Callable[..., Any], family: str, task: str) -> None:
    one, dense = setting(family, task), setting(family, task)
    context = one.context()
    QLoRA(rank=4, alpha=6.0).prepare(one.model, context)
    for name, layer in context.targets.items():
        dense.model.get_submodule(name).weight.data = layer.dequantized()  # type: ignore[operator]
    LoRA(rank=4, alpha=6.0).prepare(dense.model, dense.context())
    draw(one.model)
    trained = {n: p for n, p in one.model.named_parameters() if p.requires_grad}
    assert not dense.model.load_state_dict(trained, strict=False).unexpected_keys
    assert torch.allclose(one.logits(), dense.logits(), atol=1e-6)
    losses = [s.task.loss(s.model(**s.task.inputs(s.batch())), s.batch()) for s in (one, dense)]
    for loss in losses:
        loss.backward()
    theirs = {n: p.grad for n, p in dense.model.named_parameters() if p.requires_grad}
    mine = {n: p.grad for n, p in one.model.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[n], theirs[n], atol=1e-5) for n in mine)  # type: ignore[arg-type]
    assert all(bool(mine[n].any()) for n in mine if "lora_" in n)  # type: ignore[union-attr]


def test_a_step_moves_adapters_and_head_and_no_code(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    head = {id(p) for p in context.anatomy.head_parameters().values()}
    QLoRA(rank=2).prepare(one.model, context)
    draw(one.model)
    before = {n: t.clone() for n, t in one.model.state_dict().items()}
    learner = one.learner()
    train(learner, [one.batch()] * 2)
    named = dict(one.model.named_parameters())
    moved = {n for n, t in one.model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n, p in named.items() if "lora_" in n or id(p) in head}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_the_artifact_is_small_and_says_the_same(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, double: bool
) -> None:
    one = tuned(setting(family, task), tmp_path / "model", double_quantization=double)
    assert torch.equal(one.logits(), one.trained)
    torch.manual_seed(99)
    back = artifact.load(tmp_path / "model")
    assert torch.equal(one.logits(back.model), one.trained)
    stored = load_file(tmp_path / "model" / artifact.WEIGHTS)
    targets = list(setting(family, task).context().targets)
    weights = sum(setting(family, task).model.get_submodule(name).weight.numel() for name in targets)
    assert sum(stored[f"{name}.weight"].numel() for name in targets) == weights // 2
    assert {stored[f"{name}.weight"].dtype for name in targets} == {torch.int8}
    assert {stored[f"{name}.scale"].dtype for name in targets} == {torch.int8 if double else torch.float32}
    adapters = sum(m.numel() for n, m in back.model.named_parameters() if "lora_" in n)
    assert count(back.model)["parameters"] == count(setting(family, task).model)["parameters"] + adapters
    size = artifact.weight_bytes(tmp_path / "model")
    assert size >= (tmp_path / "model" / artifact.WEIGHTS).stat().st_size + adapters * 4


def test_a_fresh_process_says_the_same(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = tuned(setting(), tmp_path / "model")
    torch.save({"inputs": one.task.inputs(one.batch()), "logits": one.trained}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\nfrom niwaki import artifact\ntorch.set_num_threads(1)\n"
        "saved = artifact.load(sys.argv[1] + '/model')\n"
        "stored = torch.load(sys.argv[1] + '/expected.pt', weights_only=True)\n"
        "with torch.no_grad():\n    logits = saved.model(**stored['inputs']).logits\n"
        "print(torch.equal(logits, stored['logits']))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True", done.stderr[-1000:]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_puts_the_adapter_on_the_base_of_codes(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = tuned(setting(), tmp_path / "model")
    base = artifact.load(tmp_path / "model", base_alone=True).model
    assert not torch.equal(one.logits(base), one.trained)
    read = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert float((one.logits(read) - one.trained).abs().max()) <= 1e-6


@pytest.mark.parametrize(("family", "task"), [*KINDS, ("gpt2", "classification")])
def test_merged_it_is_a_dense_model(setting: Callable[..., Any], tmp_path: Path, family: str, task: str) -> None:
    one = tuned(setting(family, task), tmp_path / "model", merge=True)
    assert torch.allclose(one.logits(), one.trained, atol=1e-5)
    back = artifact.load(tmp_path / "model")
    assert back.edits == ()
    assert torch.equal(one.logits(back.model), one.logits())
    assert set(back.model.state_dict()) == set(setting(family, task).model.state_dict())
    weight = back.model.get_submodule(next(iter(one.context().targets))).weight
    assert max(len(block.unique()) for block in weight.reshape(-1, 64)) > 16  # it has left the grid


@pytest.mark.parametrize("tuning", [QLoRA(rank=4), LoRA(rank=4, merge=False)], ids=lambda tuning: tuning.name)
@pytest.mark.parametrize(("family", "task"), KINDS)
def test_as_the_start_of_another_training(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, tuning: Any
) -> None:
    one = setting(family, task)
    context, base_config = one.context(), one.model.config.to_dict()
    tuning.prepare(one.model, context)
    draw(one.model)
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=tuning.finalize(one.model, context),
    )  # fmt: skip
    dense = Pretrained(name=str(tmp_path / "model")).load(one.task, one.labels, seed=5)
    assert set(dense.state_dict()) == set(setting(family, task).model.state_dict())
    assert {type(dense.get_submodule(name)) for name in context.targets} == {nn.Linear}
    assert torch.allclose(one.logits(dense), one.logits(), atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("weight", [Magnitude(), QAT(), Int8()], ids=lambda stage: stage.name)
def test_weight_methods_are_refused_by_both_names(weight: Any, merge: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_conflicts([QLoRA(merge=merge), weight])
    assert str(caught.value).startswith(f"tuning=qlora and {weight.name}: the base is fixed in 4 bits")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"block": 0}, "block"), ({"block": 63}, "block"), ({"rank": 0}, "rank"), ({"parts": ["querry"]}, "parts")],
)
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tuning\.{name}="):
        QLoRA(**fields)


def test_parts_that_this_family_lacks(setting: Callable[..., Any]) -> None:
    context = setting().context()
    with pytest.raises(ConfigError, match=r"^tuning\.parts=\['feed_gate'\]"):
        QLoRA(parts=["feed_gate"]).check(context.anatomy, context.targets)


def test_codes_of_another_layout_are_refused(setting: Callable[..., Any], tmp_path: Path) -> None:
    import json

    tuned(setting(), tmp_path / "model")
    path = tmp_path / "model" / artifact.CARD
    card = json.loads(path.read_text())
    for change in ({"block": 32}, {"double_quantization": False}):
        path.write_text(json.dumps(card | {"edits": [card["edits"][0] | change, card["edits"][1]]}))
        with pytest.raises(ArtifactError, match="fit the structure"):
            artifact.load(tmp_path / "model")


def test_packed_weights_count_among_those_that_do_not_learn(
    setting: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from niwaki.console import Console

    one = setting()
    whole = sum(p.numel() for p in one.model.parameters())
    QLoRA(rank=1, parts=["query"]).prepare(one.model, one.context())
    Console().learning(one.model)
    assert f"of {whole + 3 * 64:,}" in capsys.readouterr().out
