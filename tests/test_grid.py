"""Every task x tuning x subset of compressions, on tiny random models: each works as promised, or is refused."""

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
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.fit import fit
from niwaki.measure.evaluate import evaluate
from niwaki.pipeline import assemble, check_on_empty_model, check_teachers, fold_and_convert, settle
from niwaki.stage import refuse_conflicts
from niwaki.weights import fold


def options(group: str) -> tuple[str, ...]:
    """The options of a config group, as its files name them: a new one is in the grid by being there."""
    folder = compose.config_folder() / group
    return tuple(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")))


TASKS = options("task")
TUNINGS = options("tuning")
# One of each kind, in every subset; tests/test_compressions.py has the others. cut: a student of the model's own layers
COMPRESSIONS = ("distill/logits", "prune/magnitude", "quantize/int8", "quantize/qat", "cut")
MODELS = {"causal_lm": "tiny-llama"}  # else tiny-bert
SETTINGS = {  # of the options that show more than their defaults do
    "prune/magnitude": ["magnitude.schedule=cubic", "magnitude.end=0.8", "magnitude.interval=1"],
    "quantize/qat": ["qat.bits=4", "qat.group=16"],
    "distill/logits": ["logits.teacher={teacher}"],
}
TUNED = {  # settings of tunings that show more than their defaults do
    "gradual": ["tuning.every=0.15"],  # thaws before and after the middle, and to the end
    "top": ["tuning.blocks=1"],
}
STEPS, STOP = 6, 3
# Codes and scales are the fold's own, so a converted model differs by the rounding of sums alone; a sum that rounds
# the other way moves a rounded activation by one code, 1/127 of its largest value.
CONVERT_BOUND = 0.01

SUBSETS = [s for n in range(len(COMPRESSIONS) + 1) for s in itertools.combinations(COMPRESSIONS, n)]
REFUSED = [s for s in SUBSETS if sum(name.startswith("quantize/") for name in s) > 1]
WORKING = [s for s in SUBSETS if s not in REFUSED]
WHOLE = os.environ.get("NIWAKI_GRID") == "whole"  # `make grid`; otherwise only these tunings meet every subset
EVERYWHERE = ("full", "head", "bitfit", "lora")
FEW: list[tuple[str, ...]] = [("prune/magnitude", "quantize/qat"), ("distill/logits",)]
OTHERS = [tuning for tuning in TUNINGS if tuning not in EVERYWHERE]
# Each group ends with one fresh process, which takes longer to start than a model to train.
TOGETHER = [(tuning,) for tuning in EVERYWHERE] + [tuple(OTHERS[i : i + 5]) for i in range(0, len(OTHERS), 5)]

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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few rows for each task."""
    folder = tmp_path_factory.mktemp("grid-data")
    words = ["a rose is red", "the sky is blue", "green grass grows here", "red and blue make violet"]
    rows: dict[str, list[dict[str, Any]]] = {"classification": [], "ner": [], "causal_lm": []}
    for i in range(24):
        text = f"{words[i % 4]} {words[(i // 4) % 4]} {i}"
        tokens = text.split()
        rows["classification"].append({"text": text, "label": "abc"[i % 3]})
        rows["ner"].append({"tokens": tokens, "tags": ["B-COLOUR" if t in {"red", "blue"} else "O" for t in tokens]})
        rows["causal_lm"].append({"text": text})
    paths = {}
    for task, found in rows.items():
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        paths[task] = str(path)
    return paths


@pytest.fixture(scope="module")
def teachers(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An untrained artifact of each task, as a teacher."""
    folder = tmp_path_factory.mktemp("grid-teachers")
    for task in TASKS:
        recipe = build(task, "full", (), files, "")
        corpus, model = load(recipe)
        work = assemble(recipe, corpus, model)
        save(folder / task, recipe, corpus, work)
    return {task: str(folder / task) for task in TASKS}


def build(task: str, tuning: str, subset: tuple[str, ...], files: dict[str, str], teacher: str) -> Any:
    methods = [name for name in subset if name != "cut"]
    model = MODELS.get(task, "tiny-bert")
    settings = [f"task={task}", f"model={model}", f"tuning={tuning}", f"compression=[{','.join(methods)}]"]
    path = files[task]
    settings += ["data=files", f"data.train={path}", f"data.validation={path}", f"data.test={path}"]
    settings += ["data.batch_size=4", f"trainer.max_steps={STEPS}", "trainer.precision=fp32", "optimizer.lr=1e-3"]
    settings += ["logger=none", "callbacks=[checkpoint]", "callbacks.checkpoint.best=false"]
    settings += [f"callbacks.checkpoint.every_steps={STOP}", "task.max_length=32"]
    for name in methods:
        settings += [f"compression.{setting.format(teacher=teacher)}" for setting in SETTINGS.get(name, [])]
    settings += TUNED.get(tuning, [])
    if "cut" in subset:
        settings += ["model.layers=[0,2]"]
    return compose.build(compose.compose(settings).config)


def load(recipe: Any) -> tuple[Corpus, Any]:
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    check_teachers(recipe, corpus, check_on_empty_model(recipe, corpus.labels))
    return corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed)


def save(folder: Path, recipe: Any, corpus: Corpus, work: Any) -> None:
    artifact.save(
        folder, model=work.model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits,
    )  # fmt: skip


def first_batch(recipe: Any, corpus: Corpus) -> dict[str, torch.Tensor]:
    return recipe.task.inputs(next(iter(corpus.evaluation("test"))))


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


ADAPTERS = {  # what the names of the parameters of each adapter contain
    "lora": ".lora_",
    "qlora": ".lora_",
    "dora": ".lora_",
    "adalora": ".lora_",
    "vera": ".vera_lambda_",
    "loha": ".hada_",
    "lokr": ".lokr_",
    "fourierft": ".fourierft_",
    "ia3": ".ia3_l.",
    "oft": ".oft_R.",
    "boft": ".boft_",
    "hra": ".hra_u.",
}


def should_learn(tuning: str, name: str, head_learns: bool, top: str) -> bool:
    """What learns, by the name of the parameter in the model before links are stacked; `top` is in those of the top
    block."""
    in_head = any(part in name for part in ("classifier", "pooler")) and head_learns
    own = {
        "full": True,
        "head": in_head or "lm_head" in name or "embed_tokens" in name,
        "bitfit": in_head or name.endswith(".bias"),
        "adapter": in_head or ".adapter." in name or is_block_norm(name),
        "adapter_pfeiffer": in_head or ".adapter." in name,
        "adapter_parallel": in_head or ".adapter." in name,
        "gradual": True,
        "layernorm": in_head or "norm" in name.lower(),
        "top": in_head or top in name or name == "model.norm.weight",
        "prefix": in_head or ".prefix." in name,
        "prompt": in_head or ".prompt." in name,
        "p_tuning": in_head or ".prompt." in name,
    }
    return own[tuning] if tuning in own else in_head or ADAPTERS[tuning] in name


def is_block_norm(name: str) -> bool:
    return "layernorm" in name.lower() and ".layer" in name


def check_learning(recipe: Any, corpus: Corpus, work: Any, tuning: str) -> None:
    """Exactly what should learn is in the optimizer, and all of it has finite gradients, not all zero."""
    named = dict(work.model.named_parameters())
    learning = {name for name, p in named.items() if p.requires_grad}
    bare = {n: n.replace("parametrizations.weight.original", "weight").replace(".base_layer", "") for n in named}
    top = f".{work.model.config.num_hidden_layers - 1}."
    assert learning == {n for n in named if should_learn(tuning, bare[n], recipe.task.head_learns, top)}
    groups = recipe.optimizer.build(work.model).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(named[n]) for n in learning}
    batch = next(iter(corpus.evaluation("train")))
    recipe.task.loss(work.model(**recipe.task.inputs(batch)), batch).backward()
    gradients = {name: named[name].grad for name in learning}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients.values())
    assert any(bool(g.any()) for g in gradients.values())
    assert all(p.grad is None for n, p in named.items() if n not in learning)
    work.model.zero_grad()


def run_one(task: str, tuning: str, subset: tuple[str, ...], folder: Path, files: Any, teachers: Any) -> Path:
    recipe = build(task, tuning, subset, files, teachers[task])
    refuse_conflicts(recipe.stages)
    corpus, model = load(recipe)
    work = assemble(recipe, corpus, model)
    check_learning(recipe, corpus, work, tuning)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    work.callbacks.append(KeepMiddle(folder / "middle"))
    fit(recipe, corpus, work, folder, {}, resume=False)
    check_moved(model, start)
    check_checkpoint(folder / "checkpoints" / "last.ckpt", work)
    check_resumed(recipe, work.model.state_dict(), folder)
    settle(recipe, work)
    inputs = first_batch(recipe, corpus)
    stacked = logits(model, inputs)
    work.context.records.update(fold(work.context.targets))
    assert torch.equal(logits(model, inputs), stacked)
    fold_and_convert(recipe, work)  # nothing is left to fold: converts alone
    converted = logits(model, inputs)
    quantized = any(name.startswith("quantize/") for name in subset)
    assert float((converted - stacked).abs().max()) <= (CONVERT_BOUND if quantized else 1e-5)
    save(folder / "model", recipe, corpus, work)
    check_saved(recipe, corpus, work, folder / "model", subset, converted)
    torch.save({"inputs": inputs, "logits": converted}, folder / "expected.pt")
    return folder / "model"


def check_moved(model: Any, start: dict[str, torch.Tensor]) -> None:
    """All that should learn moved, what is frozen did not."""
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == learning
    assert all(torch.isfinite(p).all() for p in model.parameters())


def check_resumed(recipe: Any, expected: dict[str, torch.Tensor], folder: Path) -> None:
    """From the checkpoint in the middle to the end: bit for bit the same state."""
    shutil.copy(folder / "middle" / "last.ckpt", folder / "checkpoints" / "last.ckpt")
    corpus, model = load(recipe)
    work = assemble(recipe, corpus, model)
    torch.manual_seed(12345)  # a resumed run brings its own randomness
    fit(recipe, corpus, work, folder, {}, resume=True)
    state = work.model.state_dict()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not different


def check_checkpoint(path: Path, work: Any) -> None:
    """A checkpoint holds the student's state and nothing of a teacher."""
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == {f"model.{name}" for name in work.model.state_dict()}


def check_saved(
    recipe: Any, corpus: Corpus, work: Any, folder: Path, subset: tuple[str, ...], expected: torch.Tensor
) -> None:
    """Sparsity and grid hold in the saved file, the reloaded model says the same, and it has scores."""
    saved = artifact.load(folder)
    assert torch.equal(logits(saved.model, first_batch(recipe, corpus)), expected)
    assert all(
        v == v for v in evaluate(saved.model, corpus.evaluation("test"), recipe.task, corpus.labels).compute().values()
    )
    grown = [name for name in work.context.targets if ".adapter." in name]
    linears = len(work.context.targets) - len(grown)
    assert linears == (14 if task_is_llama(recipe) else 12) * (1 if "cut" in subset else 1.5)
    assert len(grown) == len([m for n, m in work.model.named_modules() if n.endswith((".down", ".up"))])
    for name in work.context.targets:
        module: Any = saved.model.get_submodule(name)
        quantized = {"quantize/int8", "quantize/qat"} & set(subset)
        assert isinstance(module, IntegerLinear) == bool(quantized)
        weight = module.dequantized() if quantized else module.weight
        if "prune/magnitude" in subset:
            assert int((weight == 0).sum()) >= round(0.5 * weight.numel())
            assert bool((weight[~work.context.records[name]["mask"]] == 0).all())
        if "quantize/qat" in subset:
            assert (module.bits, module.group) == (4, 16)
            assert module.codes.numel() == weight.numel() // 2
            assert max(len(group.unique()) for group in weight.reshape(-1, 16)) <= 15


def task_is_llama(recipe: Any) -> bool:
    return recipe.task.name == "causal_lm"


def subsets_of(tuning: str) -> list[tuple[str, ...]]:
    """The subsets that a tuning is run with."""
    return WORKING if WHOLE or tuning in EVERYWHERE else FEW


def refuses(tuning: str, subset: tuple[str, ...]) -> bool:
    """Whether a tuning cannot be combined with the methods of a working subset."""
    return tuning == "qlora" and any(name.startswith(("prune/", "quantize/")) for name in subset)


def test_the_grid_is_complete() -> None:
    assert (len(TASKS), len(TUNINGS), len(COMPRESSIONS)) == (3, 24, 5)
    assert (len(WORKING), len(REFUSED)) == (24, 8)


@pytest.mark.parametrize("tunings", TOGETHER, ids="-".join)
@pytest.mark.parametrize("task", TASKS)
def test_combinations_work(
    task: str, tunings: tuple[str, ...], files: Any, teachers: Any, tmp_path: Path, subtests: Any
) -> None:
    saved, refused, cells = [], 0, [(tuning, subset) for tuning in tunings for subset in subsets_of(tuning)]
    for tuning, subset in cells:
        if refuses(tuning, subset):
            refused += 1
            with pytest.raises(ConfigError, match=f"^tuning={tuning} and "):
                refuse_conflicts(build(task, tuning, subset, files, "teacher").stages)
            continue
        name = "+".join((tuning, *subset)).replace("/", ".")
        with subtests.test(f"{task} x {name}"):
            saved.append(str(run_one(task, tuning, subset, tmp_path / name, files, teachers)))
    command = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, json.dumps(saved)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same") == len(saved) == len(cells) - refused


@pytest.mark.parametrize("subset", REFUSED)
@pytest.mark.parametrize("task", TASKS)
def test_combinations_are_refused_before_loading(
    task: str, subset: tuple[str, ...], files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tuning in TUNINGS:
        recipe = build(task, tuning, subset, files, "teacher")
        monkeypatch.setattr(type(recipe.model), "load", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(ConfigError, match=r"quantize/int8 and quantize/qat: .*choose one"):
            refuse_conflicts(recipe.stages)
