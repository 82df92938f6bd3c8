"""Gates that close during a fit: when, by what, and that the cut model is the gated one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki import artifact, compose
from niwaki.compression.prune.gates import Gate
from niwaki.compression.prune.heads import Heads
from niwaki.compression.prune.neurons import Neurons
from niwaki.compression.quantize.qat import QAT
from niwaki.data.corpus import Corpus
from niwaki.fit import fit
from niwaki.model.anatomy import Anatomy
from niwaki.model.units import units_of
from niwaki.optimizer import AdamW
from niwaki.pipeline import assemble, check_on_empty_model, fold_and_convert, settle
from niwaki.weights import fold

CUBIC: dict[str, Any] = {"schedule": "cubic", "interval": 1, "end": 1.0}


def gates(model: Any) -> list[Gate]:
    return [module for module in model.modules() if isinstance(module, Gate)]


def closed(model: Any) -> list[int]:
    return [int((gate.open == 0).sum()) for gate in gates(model)]


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "activation"])
@pytest.mark.parametrize("kind", [Heads, Neurons])
def test_what_is_closed_at_the_end_is_cut(
    setting: Callable[..., Any], train: Callable[..., Any], kind: Any, importance: Any
) -> None:
    one = setting()
    whole = sum(p.numel() for p in one.model.parameters())
    context = one.context(steps=4)
    stage = kind(importance=importance, **CUBIC)
    effects = stage.prepare(one.model, context)
    assert effects.settled == 4
    train(one.learner(AdamW(lr=0.01), [effects], 4), [one.batch()] * 4, callbacks=effects.callbacks)
    gated = one.logits()
    counts = {units.count for units in units_of(Anatomy.of(one.model), kind.kind)}
    (edit,) = stage.finalize(one.model, context)
    assert float((one.logits() - gated).abs().max()) < 1e-5
    assert {units.count for units in units_of(Anatomy.of(one.model), kind.kind)} == {counts.pop() // 2}
    assert sum(p.numel() for p in one.model.parameters()) < whole
    assert not gates(one.model)
    assert not any(module._forward_pre_hooks for module in one.model.modules())
    assert len(edit.kept) == 3


def test_gates_close_on_the_cubic_schedule(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    effects = Neurons(ratio=0.5, schedule="cubic", end=0.5, interval=2).prepare(one.model, one.context(steps=8))
    counts: list[int] = []

    class Watch(type(effects.callbacks[0]).__mro__[1]):  # type: ignore[misc]
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(closed(one.model)[0])

    train(one.learner(effects=[effects], steps=8), [one.batch()] * 8, callbacks=[*effects.callbacks, Watch()])
    assert counts == [0, 28, 28, 32, 32, 32, 32, 32]  # round(32 (1 - (1 - 2/4)^3)) = 28


def test_a_closed_unit_is_still_measured_and_may_open_again(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one = setting()
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    effects = Heads(importance="taylor", **CUBIC).prepare(one.model, one.context(steps=9))
    gate = gates(one.model)[1]
    gate.open.copy_(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    sums: list[torch.Tensor] = []
    schedule: Any = effects.callbacks[0]
    schedule._set = lambda scores, fraction: sums.append(scores[1].clone())
    train(one.learner(effects=[effects], steps=1), [one.batch()], callbacks=effects.callbacks)
    assert (sums[0] > 0).all()


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "activation"])
def test_what_is_closed_is_closed_while_the_model_trains(setting: Callable[..., Any], importance: Any) -> None:
    one, twin = setting(), setting()
    effects = Heads(importance=importance, **CUBIC).prepare(one.model, one.context(steps=9))
    schedule: Any = effects.callbacks[0]
    schedule.setup(None, None, "fit")
    for gate, units in zip(gates(one.model), units_of(Anatomy.of(twin.model), "heads"), strict=True):
        gate.open.copy_(torch.tensor([0.0, 1.0, 1.0, 0.0]))
        twin.model.get_submodule(units.output).weight.data[:, units.column_indices([0, 3])] = 0
    inputs = one.task.inputs(one.batch())
    assert torch.allclose(one.model.train()(**inputs).logits, twin.model.train()(**inputs).logits, atol=1e-6)


def test_activations_are_rounded_by_what_is_open(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context(steps=9)
    with torch.no_grad():
        for block in one.model.bert.encoder.layer:
            block.intermediate.dense.bias[0] = 1000.0  # a scale for all others that none of them would survive
    stage = Neurons(**CUBIC)
    schedule: Any = stage.prepare(one.model, context).callbacks[0]
    QAT().prepare(one.model, context)
    schedule.setup(None, None, "fit")
    for gate in gates(one.model):
        gate.open[0] = 0
    gated = one.logits()
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    assert float((one.logits() - gated).abs().max()) < 1e-6


def test_padding_and_validation_are_not_measured(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    effects = Neurons(importance="activation", schedule="cubic", interval=100).prepare(one.model, one.context(steps=9))
    batch = one.batch()
    learner = one.learner(effects=[effects], steps=9)
    train(learner, [batch] * 2, [batch] * 3, callbacks=effects.callbacks, val_check_interval=1)
    assert {float(gate.count) for gate in gates(one.model)} == {2.0 * float(batch["attention_mask"].sum())}


SETTINGS = [
    *(f"compression.{kind}.schedule=cubic" for kind in ("heads", "neurons")),
    *(f"compression.{kind}.interval=1" for kind in ("heads", "neurons")),
    "compression.heads.importance=taylor", "compression.neurons.importance=activation",
    "compression.neurons.scope=global",
]  # fmt: skip
WITH: list[tuple[str, str, tuple[str, ...]]] = [
    ("tiny-llama", "lora", ("prune/magnitude",)),
    ("tiny-gpt2", "lora", ("prune/magnitude", "quantize/qat")),
    ("tiny-bert", "adapter", ("quantize/qat",)),
    ("tiny-bert", "adapter_parallel", ()),
    ("tiny-llama", "prefix", ("quantize/int8",)),
    ("tiny-t5", "prefix", ()),
    ("tiny-t5", "lora", ()),
    ("tiny-bart", "dora", ()),
    ("tiny-modernbert", "ia3", ("quantize/qat",)),
    ("tiny-albert", "full", ("quantize/int8",)),
    ("tiny-bert", "prompt", ()),
    ("tiny-deberta-v2", "bitfit", ()),
]
ONE_SHOT: list[tuple[str, str, tuple[str, ...], list[str]]] = [
    ("tiny-bert", "qlora", (), []),
    ("tiny-bert", "lora", (), ["tuning.merge=false"]),
    ("tiny-t5", "lora", (), ["model.layers=[0,2]", "compression.heads.scope=global"]),
    ("tiny-bert", "prefix", ("prune/magnitude",), ["compression.magnitude.pattern='2:4'"]),
    ("tiny-bert", "adapter_pfeiffer", ("quantize/qat",), ["compression.qat.group=8"]),
    ("tiny-bert", "full", ("distill/logits",), ["compression.logits.teacher={teacher}"]),
]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    texts = [f"a rose is red {i} times " * (1 + i % 3) for i in range(24)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "{text}", "label": "{"abc"[i % 3]}"}}\n' for i, text in enumerate(texts)))
    return str(path)


def build(model: str, tuning: str, methods: tuple[str, ...], rows: str, settings: list[str]) -> Any:
    chosen = ",".join(["prune/heads", "prune/neurons", *methods])
    plain = ["task=classification", f"model={model}", f"tuning={tuning}", "task.max_length=32", "data=files"]
    plain += [f"compression=[{chosen}]", "data.batch_size=4", "optimizer.lr=1e-2", "trainer.max_steps=4"]
    plain += [f"data.{split}={rows}" for split in ("train", "validation", "test")]
    plain += ["trainer.precision=fp32", "logger=none", "callbacks=[checkpoint]", "callbacks.checkpoint.best=false"]
    return compose.build(compose.compose(plain + settings).config)


def live(recipe: Any, folder: Path) -> tuple[Any, Any]:
    """A whole run up to the artifact: its work, and the artifact; the gated, cut and saved models agree."""
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    check_on_empty_model(recipe, corpus.labels)
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    work = assemble(recipe, corpus, model)
    fit(recipe, corpus, work, folder, {}, resume=False)
    settle(recipe, work)
    inputs = recipe.task.inputs(next(iter(corpus.evaluation("test"))))
    with torch.inference_mode():
        gated = model.eval()(**inputs).logits
        fold_and_convert(recipe, work)
        cut = model.eval()(**inputs).logits
    artifact.save(
        folder / "model", model=model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits,
    )  # fmt: skip
    saved = artifact.load(folder / "model")
    with torch.inference_mode():
        assert torch.equal(saved.model(**inputs).logits, cut)
    integers = any("quantize" in stage.name for stage in recipe.stages)
    assert float((gated - cut).abs().max()) < (1e-4 if integers else 1e-5)
    return work, saved


@pytest.mark.parametrize(("model", "tuning", "methods"), WITH)
def test_gates_with_tunings_and_weight_methods(
    model: str, tuning: str, methods: tuple[str, ...], rows: str, tmp_path: Path
) -> None:
    work, _ = live(build(model, tuning, methods, rows, SETTINGS), tmp_path / "run")
    counts = [units.count for units in units_of(work.context.anatomy, "heads")]
    assert set(counts) == ({1} if model == "tiny-llama" else {2})


@pytest.mark.parametrize(("model", "tuning", "methods", "settings"), ONE_SHOT)
def test_one_shot_with_tunings_and_weight_methods(
    model: str, tuning: str, methods: tuple[str, ...], settings: list[str], rows: str, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher" / "model"
    if any("{teacher}" in setting for setting in settings):
        live(build(model, "full", (), rows, []), teacher.parent)
    filled = [setting.format(teacher=teacher) for setting in settings]
    live(build(model, tuning, methods, rows, filled), tmp_path / "run")


def test_another_run_starts_from_layers_of_different_sizes(rows: str, tmp_path: Path) -> None:
    _first, _saved = live(build("tiny-t5", "full", (), rows, ["compression.heads.scope=global"]), tmp_path / "first")
    place = str(tmp_path / "first" / "model")
    settings = [f"model.name={place}", "compression.heads.keep=1", "compression.neurons.ratio=0.5", "model.layers=[0]"]
    _second, again = live(build("pretrained", "lora", (), rows, settings), tmp_path / "second")
    assert {units.count for units in units_of(Anatomy.of(again.model), "heads")} == {1}
    assert {units.count for units in units_of(Anatomy.of(again.model), "neurons")} == {16}
    shutil.rmtree(tmp_path / "first")
