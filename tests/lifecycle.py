"""The life of a run on tiny random models, with the promises that every method keeps; and a few rows for each task."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from niwaki import artifact, compose
from niwaki.data.corpus import Corpus
from niwaki.fit import Work, fit
from niwaki.pipeline import assemble, check_on_empty_model, check_teachers, fold_and_convert, read, settle
from niwaki.recipe import Recipe
from niwaki.stage import refuse_conflicts
from niwaki.weights import fold

TASKS = ("classification", "ner", "causal_lm")  # of every grid
FURTHER = ("masked_lm", "translation", "retrieval")  # of some cells of each
MODELS = {"causal_lm": "tiny-llama", "translation": "tiny-bart"}  # else tiny-bert
LARGER = {"causal_lm": "{hidden_size:48,head_dim:12,num_hidden_layers:5}"}  # teachers; else as in `write_teachers`
STEPS, STOP = 6, 3
# Codes and scales are the fold's own, bit for bit, so a converted model differs by the rounding of sums alone. Where
# such a sum rounds the other way, an activation moves by one code, 1/127 of its largest value: few answers change so.
EXACT, FLIPPED = 1e-5, 0.03  # off by: the middle answer, the worst one; of the largest logit where that is above 1

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


def write_rows(folder: Path, count: int = 24) -> dict[str, str]:
    """A file of rows for each task; all of a task's texts differ."""
    words = ["a rose is red", "the sky is blue", "green grass grows here", "red and blue make violet"]
    texts = [f"{words[i % 4]} {words[i // 4 % 4]} {i}" for i in range(count)]
    rows: dict[str, list[dict[str, Any]]] = {
        "classification": [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(texts)],
        "ner": [
            {"tokens": text.split(), "tags": ["B-C" if t in {"red", "blue"} else "O" for t in text.split()]}
            for text in texts
        ],
        "causal_lm": [{"text": text} for text in texts],
        "translation": [{"source": text, "target": text[::-1]} for text in texts],
        "masked_lm": [{"text": text} for text in texts],
        "retrieval": [
            {"history": [text, texts[i - 1]], "candidate": texts[i // 2], "label": i % 2}
            for i, text in enumerate(texts)
        ],
    }
    paths = {}
    for task, found in rows.items():
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        paths[task] = str(path)
    return paths


def recipe_of(task: str, path: str, *settings: str, checkpoints: bool = True) -> Recipe:
    """A short run on the rows at a path, which writes a checkpoint in the middle unless told otherwise."""
    common = [f"task={task}", f"model={MODELS.get(task, 'tiny-bert')}", "task.max_length=32", "data=files"]
    common += ["data.batch_size=4", *(f"data.{split}={path}" for split in ("train", "validation", "test"))]
    common += [f"trainer.max_steps={STEPS}", "trainer.precision=fp32", "optimizer.lr=1e-3", "logger=none"]
    if checkpoints:
        settings = ("callbacks.checkpoint.best=false", f"callbacks.checkpoint.every_steps={STOP}", *settings)
    common += [f"callbacks=[{'checkpoint' if checkpoints else ''}]"]
    return compose.build(compose.compose([*common, *settings]).config)


def write_teachers(files: dict[str, str], folder: Path, *, larger: bool) -> dict[str, str]:
    """An untrained artifact of each task, wider and deeper than the students if asked for."""
    for task, path in files.items():
        width = f"model.overrides={LARGER.get(task, '{hidden_size:48,num_hidden_layers:5}')}"
        recipe = recipe_of(task, path, *([width, "seed=1"] if larger else []))
        corpus, work = begin(recipe)
        save(folder / task, recipe, corpus, work)
    return {task: str(folder / task) for task in files}


def look(recipe: Recipe) -> None:
    """What refuses a recipe before any weight is loaded, data and teachers aside."""
    refuse_conflicts(recipe.stages)
    check_on_empty_model(recipe, ("a", "b", "c"))


def begin(recipe: Recipe) -> tuple[Corpus, Work]:
    """Everything before the fit."""
    refuse_conflicts(recipe.stages)
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = read(recipe)
    check_teachers(recipe, corpus, check_on_empty_model(recipe, corpus.labels, corpus.tokens))
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    recipe.task.begin(model, corpus.as_loaded)
    return corpus, assemble(recipe, corpus, model)


def train(recipe: Recipe, corpus: Corpus, work: Work, folder: Path) -> None:
    """The fit. Its checkpoints hold what learns and nothing of a teacher, and from the one in the middle on it is bit
    for bit the same."""
    work.callbacks.append(KeepMiddle(folder / "middle"))
    fit(recipe, corpus, work, folder, {}, resume=False)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {f"model.{n}" for n in work.model.state_dict()} | {f"beside.{n}" for n in beside(work)}
    check_resumed(recipe, work, folder)


def beside(work: Work) -> dict[str, torch.nn.Parameter]:
    """What learns beside the model."""
    return {f"{key}.{name}": p for key, module in work.modules.items() for name, p in module.named_parameters()}


def check_resumed(recipe: Recipe, done: Work, folder: Path) -> None:
    shutil.copy(folder / "middle" / "last.ckpt", folder / "checkpoints" / "last.ckpt")
    corpus, work = begin(recipe)
    torch.manual_seed(12345)  # a resumed run brings its own randomness
    fit(recipe, corpus, work, folder, {}, resume=True)
    again, expected = ({**one.model.state_dict(), **beside(one)} for one in (work, done))
    assert again.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(again[name], expected[name])]


@dataclass(frozen=True)
class Finished:
    """The artifact of a run: its folder, the model that was reloaded from it, and the weights that were folded."""

    folder: Path
    model: Any
    folded: dict[str, Tensor]


def finish(recipe: Recipe, corpus: Corpus, work: Work, folder: Path) -> Finished:
    """Fold, convert, save: the fold is exact, the conversion within a bound, and what is reloaded says the same. What
    is said goes to `folder`/expected.pt."""
    recipe.task.refit(work.model, corpus)
    settle(recipe, work)
    recipe.task.refit(work.model, corpus)
    inputs = recipe.task.inputs(next(iter(corpus.evaluation("test"))))
    stacked = logits(work.model, inputs)
    work.context.records.update(fold(work.context.targets))
    assert torch.equal(logits(work.model, inputs), stacked)
    folded = {name: linear.weight.detach().clone() for name, linear in work.context.targets.items()}
    fold_and_convert(recipe, work)  # nothing is left to fold: converts alone
    converted = logits(work.model, inputs)
    assert bool(torch.isfinite(converted).all())
    quantized = any(stage.name.startswith("quantize/") for stage in recipe.stages)
    off = (converted - stacked).abs().amax(-1) / stacked.abs().max().clamp(min=1.0)
    assert float(off.median()) <= EXACT
    assert float(off.max()) <= (FLIPPED if quantized else EXACT)
    save(folder / "model", recipe, corpus, work)
    reloaded = artifact.load(folder / "model").model
    assert torch.equal(logits(reloaded, inputs), converted)
    torch.save({"inputs": inputs, "logits": converted}, folder / "expected.pt")
    return Finished(folder / "model", reloaded, folded)


def live(recipe: Recipe, folder: Path) -> Path:
    """A whole run; the folder of the artifact."""
    corpus, work = begin(recipe)
    train(recipe, corpus, work, folder)
    return finish(recipe, corpus, work, folder).folder


def save(folder: Path, recipe: Recipe, corpus: Corpus, work: Work) -> None:
    artifact.save(
        folder, model=work.model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits, store="auto",
    )  # fmt: skip


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model.eval()(**inputs).logits.clone()
    return result


def check_in_a_fresh_process(artifacts: Sequence[Path]) -> None:
    """All of them say there what they said here."""
    command = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, json.dumps([str(path) for path in artifacts])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same") == len(artifacts)


class KeepMiddle(pl.Callback):
    """Copies the checkpoint of the middle of the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == STOP:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", self.folder / "last.ckpt")
