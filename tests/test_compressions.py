"""Every other method of pruning, sharing and factorisation x {full, lora} x {alone, quantize/qat} x task, on tiny
random models: trains, resumes, folds, is saved and reloaded by a fresh process with the same logits, or is refused."""

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
from niwaki.errors import ConfigError
from niwaki.fit import fit
from niwaki.pipeline import assemble, check_on_empty_model, fold_and_convert, read, settle
from niwaki.stage import refuse_conflicts
from niwaki.weights import fold

TASKS = ("classification", "ner", "causal_lm")
MODELS = {"causal_lm": "tiny-llama"}  # else tiny-bert
STEPS, STOP = 6, 3
CONVERT_BOUND = 0.01  # as in tests/test_grid.py

SETTINGS: dict[str, list[str]] = {  # of the methods that show more than their defaults do, without "compression."
    "prune/heads": ["heads.schedule=cubic", "heads.importance=taylor", "heads.interval=2", "heads.end=1.0"],
    "prune/neurons": ["neurons.scope=global", "neurons.importance=activation"],
    "prune/vocabulary": ["vocabulary.alphabet=false"],  # the tokens of the tiny models are characters
    "prune/magnitude": ["magnitude.schedule=rewind", "magnitude.rounds=2"],
    "prune/random": ["random.schedule=rigl", "random.interval=2", "random.fraction=0.5"],
    "prune/taylor": ["taylor.schedule=cubic", "taylor.interval=2", "taylor.end=0.9", "taylor.pattern=2x2"],
    "prune/movement": ["movement.interval=2", "movement.targets=[query,feed_in,feed_out]"],
    "prune/soft_movement": ["soft_movement.penalty=0.1", "soft_movement.threshold=0.45"],
    "prune/wanda": ["wanda.rows=9", "wanda.sparsity=0.3"],
    "prune/sparsegpt": ["sparsegpt.rows=9", "sparsegpt.pattern='2:4'"],
    "factorize/svd": ["svd.activation_aware=true", "svd.rows=8"],
    "share/codebook": ["codebook.begin=0.34", "codebook.reassign=1"],  # drawn before the middle, assigned after it
}
REFUSED: dict[tuple[str, ...], str] = {  # (method, another method or tuning ...): what the refusal says
    # Those of an untied model: tests/compression/share/test_embeddings.py
    ("share/embeddings", "causal_lm"): "tied to its embeddings already",
    ("share/embeddings",): "has no output layer",
}

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
    """The options of the groups prune, share and factorize, as their files name them."""
    folder = compose.config_folder() / "compression"
    found = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return [name for name in found if name.partition("/")[0] in ("prune", "share", "factorize")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few rows for each task."""
    folder = tmp_path_factory.mktemp("compressions")
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


def build(task: str, tuning: str, chosen: tuple[str, ...], path: str) -> Any:
    settings = [f"task={task}", f"model={MODELS.get(task, 'tiny-bert')}", f"tuning={tuning}", "task.max_length=32"]
    settings += [f"compression=[{','.join(chosen)}]", "data=files", "data.batch_size=4", "optimizer.lr=1e-3"]
    settings += [f"data.{split}={path}" for split in ("train", "validation", "test")]
    settings += [f"trainer.max_steps={STEPS}", "trainer.precision=fp32", "logger=none", "callbacks=[checkpoint]"]
    settings += ["callbacks.checkpoint.best=false", f"callbacks.checkpoint.every_steps={STOP}"]
    settings += [f"compression.{setting}" for name in chosen for setting in SETTINGS.get(name, [])]
    return compose.build(compose.compose(settings).config)


def look(recipe: Any) -> None:
    """What refuses a recipe before any weight is loaded."""
    refuse_conflicts(recipe.stages)
    check_on_empty_model(recipe, ("a", "b", "c"))


def load(recipe: Any) -> tuple[Corpus, Any]:
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = read(recipe)
    check_on_empty_model(recipe, corpus.labels)
    return corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed)


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


def run_one(task: str, tuning: str, chosen: tuple[str, ...], folder: Path, path: str) -> Path:
    """The life of a run, with its promises; the folder of the artifact."""
    recipe = build(task, tuning, chosen, path)
    refuse_conflicts(recipe.stages)
    corpus, model = load(recipe)
    work = assemble(recipe, corpus, model)
    work.callbacks.append(KeepMiddle(folder / "middle"))
    fit(recipe, corpus, work, folder, {}, resume=False)
    check_resumed(recipe, work.model.state_dict(), folder)
    settle(recipe, work)
    inputs = recipe.task.inputs(next(iter(corpus.evaluation("test"))))
    stacked = logits(work.model, inputs)
    work.context.records.update(fold(work.context.targets))
    assert torch.equal(logits(work.model, inputs), stacked)
    fold_and_convert(recipe, work)  # nothing is left to fold: converts alone
    converted = logits(work.model, inputs)
    assert float((converted - stacked).abs().max()) <= (CONVERT_BOUND if "quantize/qat" in chosen else 1e-5)
    artifact.save(
        folder / "model", model=work.model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits, store="auto",
    )  # fmt: skip
    torch.save({"inputs": inputs, "logits": converted}, folder / "expected.pt")
    return folder / "model"


def check_resumed(recipe: Any, expected: dict[str, torch.Tensor], folder: Path) -> None:
    """From the checkpoint in the middle to the end: bit for bit the same state."""
    shutil.copy(folder / "middle" / "last.ckpt", folder / "checkpoints" / "last.ckpt")
    corpus, model = load(recipe)
    work = assemble(recipe, corpus, model)
    torch.manual_seed(12345)  # a resumed run brings its own randomness
    fit(recipe, corpus, work, folder, {}, resume=True)
    state = work.model.state_dict()
    assert state.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(state[name], expected[name])]


def cells(method: str) -> list[tuple[str, tuple[str, ...]]]:
    """(tuning, methods) of each cell of a method."""
    with_integers = itertools.product(("full", "lora"), ((method,), (method, "quantize/qat")))
    return list(with_integers)


def pairs() -> list[tuple[str, str]]:
    """Methods that are run together: each with the next one of the list, or with every other (`make grid`)."""
    found = methods()
    if os.environ.get("NIWAKI_GRID") == "whole":
        return list(itertools.combinations(found, 2))
    return list(zip(found, [*found[1:], found[0]], strict=True))


def refusal(recipe: Any) -> str | None:
    """Why a recipe is refused before any weight is loaded."""
    try:
        look(recipe)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("pair", pairs(), ids="+".join)
def test_pairs_work_or_are_refused(pair: tuple[str, str], tuning: str, files: dict[str, str], tmp_path: Path) -> None:
    path = files["classification"]
    reason = refusal(build("classification", tuning, pair, path))
    if reason is None:
        folder = run_one("classification", tuning, pair, tmp_path, path)
        stored = torch.load(tmp_path / "expected.pt", weights_only=True)
        assert torch.equal(logits(artifact.load(folder).model, stored["inputs"]), stored["logits"])
    else:
        assert any(one.rpartition("/")[2] in reason for one in pair)
        assert "\n" not in reason


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("task", TASKS)
def test_methods_work_or_are_refused(
    task: str, method: str, files: dict[str, str], tmp_path: Path, subtests: Any
) -> None:
    saved, refused = [], 0
    for tuning, chosen in cells(method):
        name = "+".join((tuning, *chosen)).replace("/", ".")
        reason = next((why for key, why in REFUSED.items() if set(key) <= {task, tuning, *chosen}), None)
        with subtests.test(f"{task} x {name}"):
            if reason:
                refused += 1
                with pytest.raises(ConfigError, match=reason):
                    look(build(task, tuning, chosen, files[task]))
            else:
                saved.append(str(run_one(task, tuning, chosen, tmp_path / name, files[task])))
    command = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, json.dumps(saved)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same") == len(saved) == len(cells(method)) - refused
