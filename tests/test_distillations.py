"""Every distillation but logits, which is in tests/test_grid.py, x {full, lora} x {alone, pruned and quantized} x task.

Tiny random models with a wider and deeper teacher: each trains, resumes bit for bit, leaves neither teacher nor
projection in the artifact, which a fresh process reloads with the same logits.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from niwaki import artifact, compose
from niwaki.data.corpus import Corpus
from niwaki.fit import fit
from niwaki.pipeline import assemble, check_on_empty_model, check_teachers, fold_and_convert, settle
from niwaki.stage import refuse_conflicts
from niwaki.weights import fold

TASKS = ("classification", "ner", "causal_lm")
MODELS = {"causal_lm": "tiny-llama"}  # else tiny-bert
LARGER = {"causal_lm": "{hidden_size:48,head_dim:12,num_hidden_layers:5}"}
STEPS, STOP = 6, 3
CONVERT_BOUND = 0.01  # as in tests/test_grid.py
PROJECTED = {"distill/hidden": 2, "distill/cosine": 1, "distill/pkd": 1}  # learned maps to the teacher's width

CHECK_IN_A_FRESH_PROCESS = """
import json, sys, torch
from niwaki import artifact
torch.set_num_threads(1)
for folder in json.loads(sys.argv[1]):
    saved = artifact.load(folder)
    stored = torch.load(folder + "/../expected.pt", weights_only=True)
    with torch.inference_mode():
        logits = saved.model(**stored["inputs"]).logits
    assert torch.equal(logits, stored["logits"]), folder
    print("same", folder)
"""


def methods() -> list[str]:
    """The options of the group, as their files name them."""
    folder = compose.config_folder() / "compression" / "distill"
    return [f"distill/{path.stem}" for path in sorted(folder.glob("*.yaml")) if path.stem != "logits"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few rows for each task."""
    folder = tmp_path_factory.mktemp("distillations")
    words = ["a rose is red", "the sky is blue", "green grass grows here", "red and blue make violet"]
    texts = [f"{words[i % 4]} {words[i // 4 % 4]} {i}" for i in range(24)]
    rows: dict[str, list[dict[str, Any]]] = {
        "classification": [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(texts)],
        "ner": [
            {"tokens": text.split(), "tags": ["B-C" if t in {"red", "blue"} else "O" for t in text.split()]}
            for text in texts
        ],
        "causal_lm": [{"text": text} for text in texts],
    }
    paths = {}
    for task, found in rows.items():
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        paths[task] = str(path)
    return paths


@pytest.fixture(scope="module")
def teachers(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An untrained artifact of each task, wider and deeper than the student."""
    folder = tmp_path_factory.mktemp("teachers")
    for task in TASKS:
        larger = LARGER.get(task, "{hidden_size:48,num_hidden_layers:5}")
        recipe = build(task, "full", (), files[task], f"model.overrides={larger}", "seed=1")
        corpus, model = load(recipe)
        save(folder / task, recipe, corpus, assemble(recipe, corpus, model))
    return {task: str(folder / task) for task in TASKS}


def build(task: str, tuning: str, chosen: tuple[str, ...], path: str, *more: str) -> Any:
    settings = [f"task={task}", f"model={MODELS.get(task, 'tiny-bert')}", f"tuning={tuning}", "task.max_length=32"]
    settings += [f"compression=[{','.join(chosen)}]", "data=files", "data.batch_size=4", "optimizer.lr=1e-3"]
    settings += [f"data.{split}={path}" for split in ("train", "validation", "test")]
    settings += [f"trainer.max_steps={STEPS}", "trainer.precision=fp32", "logger=none", "callbacks=[checkpoint]"]
    settings += ["callbacks.checkpoint.best=false", f"callbacks.checkpoint.every_steps={STOP}", *more]
    return compose.build(compose.compose(settings).config)


def load(recipe: Any) -> tuple[Corpus, Any]:
    refuse_conflicts(recipe.stages)
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    check_teachers(recipe, corpus, check_on_empty_model(recipe, corpus.labels))
    return corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed)


def save(folder: Path, recipe: Any, corpus: Corpus, work: Any) -> None:
    artifact.save(
        folder, model=work.model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits,
    )  # fmt: skip


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs).logits.clone()


class KeepMiddle(pl.Callback):
    """Copies the checkpoint of the middle of the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", self.folder / "last.ckpt")


def run_one(recipe: Any, method: str, folder: Path) -> Path:
    """The life of a run, with its promises; the folder of the artifact."""
    corpus, model = load(recipe)
    plain = {name for name, _ in model.named_modules()}
    work = assemble(recipe, corpus, model)
    start = {name: p.detach().clone() for name, p in beside(work)}
    work.callbacks.append(KeepMiddle(folder / "middle"))
    fitted = fit(recipe, corpus, work, folder, {}, resume=False)
    assert fitted.trainable == sum(p.numel() for p in work.model.parameters() if p.requires_grad)
    assert len(start) == PROJECTED.get(method, 0)
    assert not [name for name, p in beside(work) if torch.equal(p, start[name])]  # the projections learned
    check_checkpoint(folder / "checkpoints" / "last.ckpt", work)
    check_resumed(recipe, work, folder)
    settle(recipe, work)
    inputs = recipe.task.inputs(next(iter(corpus.evaluation("test"))))
    stacked = logits(work.model, inputs)
    work.context.records.update(fold(work.context.targets))
    assert torch.equal(logits(work.model, inputs), stacked)
    fold_and_convert(recipe, work)  # nothing is left to fold: converts alone
    converted = logits(work.model, inputs)
    assert float((converted - stacked).abs().max()) <= (CONVERT_BOUND if len(recipe.compression) > 1 else 1e-5)
    save(folder / "model", recipe, corpus, work)
    assert {name for name, _ in artifact.load(folder / "model").model.named_modules()} == plain
    torch.save({"inputs": inputs, "logits": converted}, folder / "expected.pt")
    return folder / "model"


def beside(work: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """What learns beside the model."""
    return [(f"{key}.{name}", p) for key, module in work.modules.items() for name, p in module.named_parameters()]


def check_checkpoint(path: Path, work: Any) -> None:
    """It holds the student and the projections, and nothing of a teacher."""
    state = torch.load(path, weights_only=True)["state_dict"]
    projections = {f"beside.{name}" for name, _ in beside(work)}
    assert set(state) == {f"model.{name}" for name in work.model.state_dict()} | projections


def check_resumed(recipe: Any, done: Any, folder: Path) -> None:
    """From the checkpoint in the middle to the end: bit for bit the same state, of what is beside the model too."""
    shutil.copy(folder / "middle" / "last.ckpt", folder / "checkpoints" / "last.ckpt")
    corpus, model = load(recipe)
    work = assemble(recipe, corpus, model)
    torch.manual_seed(12345)  # a resumed run brings its own randomness
    fit(recipe, corpus, work, folder, {}, resume=True)
    state, expected = work.model.state_dict(), done.model.state_dict()
    assert state.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(state[name], expected[name])]
    again = dict(beside(work))
    assert all(torch.equal(p, again[name]) for name, p in beside(done))


CELLS = list(itertools.product(("full", "lora"), ((), ("prune/magnitude", "quantize/qat"))))


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("task", TASKS)
def test_methods_work(task: str, method: str, files: Any, teachers: Any, tmp_path: Path, subtests: Any) -> None:
    saved = []
    for tuning, others in CELLS:
        name = "+".join((tuning, *others)).replace("/", ".")
        with subtests.test(f"{task} x {name}"):
            place = f"compression.{method.rpartition('/')[2]}.teacher={teachers[task]}"
            recipe = build(task, tuning, (method, *others), files[task], place)
            saved.append(str(run_one(recipe, method, tmp_path / name)))
    command = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, json.dumps(saved)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same") == len(saved) == len(CELLS)


def test_all_together_with_one_teacher(files: Any, teachers: Any, tmp_path: Path) -> None:
    """Every term at once; one of them names the teacher."""
    everything = ("distill/logits", *methods())
    place = f"compression.minilm.teacher={teachers['classification']}"
    recipe = build(
        "classification", "lora", everything, files["classification"], place, "compression.minilm.precision=bf16"
    )
    corpus, model = load(recipe)
    work = assemble(recipe, corpus, model)
    assert set(work.terms) == set(everything)
    assert len({id(term.teacher) for term in work.terms.values()}) == 1  # type: ignore[attr-defined]
    fit(recipe, corpus, work, tmp_path, {}, resume=False)
    assert all(torch.isfinite(p).all() for p in work.model.parameters())
