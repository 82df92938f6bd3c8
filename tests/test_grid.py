"""Every task x tuning x subset of compressions, on tiny random models: each works as promised, or is refused."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import (
    FURTHER,
    TASKS,
    begin,
    check_in_a_fresh_process,
    finish,
    recipe_of,
    train,
    write_rows,
    write_teachers,
)

from niwaki.combinations import names
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.measure.evaluate import evaluate
from niwaki.recipe import Recipe
from niwaki.stage import refuse_conflicts

TUNINGS = names("tuning")
# One of each kind, in every subset; tests/test_compressions.py has the others. cut: a student of the model's own layers
COMPRESSIONS = ("distill/logits", "prune/magnitude", "quantize/int8", "quantize/qat", "cut")
SETTINGS = {  # of the options that show more than their defaults do
    "prune/magnitude": ["magnitude.schedule=cubic", "magnitude.end=0.8", "magnitude.interval=1"],
    "quantize/qat": ["qat.bits=4", "qat.group=16"],
    "distill/logits": ["logits.teacher={teacher}"],
}
TUNED = {  # settings of tunings that show more than their defaults do
    "gradual": ["tuning.every=0.15"],  # thaws before and after the middle, and to the end
    "top": ["tuning.blocks=1"],
}

SUBSETS = [s for n in range(len(COMPRESSIONS) + 1) for s in itertools.combinations(COMPRESSIONS, n)]
REFUSED = [s for s in SUBSETS if sum(name.startswith("quantize/") for name in s) > 1]
WORKING = [s for s in SUBSETS if s not in REFUSED]
WHOLE = os.environ.get("NIWAKI_GRID") == "whole"  # `make grid`; otherwise only these tunings meet every subset
EVERYWHERE = ("full", "head", "bitfit", "lora")
FEW: list[tuple[str, ...]] = [("prune/magnitude", "quantize/qat"), ("distill/logits",)]
ALONE: list[tuple[str, ...]] = [(), *FEW]  # of the further tasks; tests/test_combinations.py has the rest
TIED_HEADS = ("lm_head", "embed_tokens", "cls.", "word_embeddings", "shared")
OTHERS = [tuning for tuning in TUNINGS if tuning not in EVERYWHERE]
# Each group ends with one fresh process, which takes longer to start than a model to train.
TOGETHER = [(tuning,) for tuning in EVERYWHERE] + [tuple(OTHERS[i : i + 5]) for i in range(0, len(OTHERS), 5)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def teachers(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_teachers(files, tmp_path_factory.mktemp("teachers"), larger=False)


def build(task: str, tuning: str, subset: tuple[str, ...], files: dict[str, str], teacher: str) -> Recipe:
    methods = [name for name in subset if name != "cut"]
    settings = [f"tuning={tuning}", *TUNED.get(tuning, []), f"compression=[{','.join(methods)}]"]
    for name in methods:
        settings += [f"compression.{setting.format(teacher=teacher)}" for setting in SETTINGS.get(name, [])]
    if "cut" in subset:
        settings += ["model.layers=[0,2]"]
    return recipe_of(task, files[task], *settings)


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
        "head": in_head or (not head_learns and any(part in name for part in TIED_HEADS)),
        "bitfit": in_head or (name.endswith(".bias") and not name.startswith("cls.")),
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


HEADLESS = ("retrieval",)  # its vectors are those of the backbone; tests/task/test_retrieval.py has the refusal
GROUPS = [(task, group) for task in TASKS for group in TOGETHER] + [
    (task, tuple(name for name in ("head", "bitfit", "lora") if name != "head" or task not in HEADLESS))
    for task in FURTHER
]


def run_one(task: str, tuning: str, subset: tuple[str, ...], folder: Path, files: Any, teachers: Any) -> Path:
    recipe = build(task, tuning, subset, files, teachers[task])
    corpus, work = begin(recipe)
    check_learning(recipe, corpus, work, tuning)
    start = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    train(recipe, corpus, work, folder)
    check_moved(work.model, start)
    saved = finish(recipe, corpus, work, folder)
    check_saved(recipe, corpus, work, saved.model, subset)
    return saved.folder


def check_moved(model: Any, start: dict[str, torch.Tensor]) -> None:
    """All that should learn moved, what is frozen did not."""
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == learning
    assert all(torch.isfinite(p).all() for p in model.parameters())


def check_saved(recipe: Any, corpus: Corpus, work: Any, model: Any, subset: tuple[str, ...]) -> None:
    """Sparsity and grid hold in the model that was reloaded, and it has scores."""
    scores = evaluate(model, corpus.evaluation("test"), recipe.task, corpus.labels, corpus.tokenizer).compute()
    assert all(value == value for value in scores.values())
    grown = [name for name in work.context.targets if ".adapter." in name]
    linears = len(work.context.targets) - len(grown)
    of_two_blocks = {"causal_lm": 14, "translation": 32}.get(recipe.task.name, 12)
    assert linears == of_two_blocks * (1 if "cut" in subset else 1.5)
    assert len(grown) == len([m for n, m in work.model.named_modules() if n.endswith((".down", ".up"))])
    for name in work.context.targets:
        module: Any = model.get_submodule(name)
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


def subsets_of(task: str, tuning: str) -> list[tuple[str, ...]]:
    """The subsets that a tuning is run with."""
    if task not in TASKS:
        return ALONE
    return WORKING if WHOLE or tuning in EVERYWHERE else FEW


def refuses(tuning: str, subset: tuple[str, ...]) -> bool:
    """Whether a tuning cannot be combined with the methods of a working subset."""
    return tuning == "qlora" and any(name.startswith(("prune/", "quantize/")) for name in subset)


def test_the_grid_is_complete() -> None:
    assert (len(TASKS), len(TUNINGS), len(COMPRESSIONS)) == (3, 24, 5)
    assert (len(WORKING), len(REFUSED)) == (24, 8)


@pytest.mark.parametrize(("task", "tunings"), GROUPS, ids=lambda one: one if isinstance(one, str) else "-".join(one))
def test_combinations_work(
    task: str, tunings: tuple[str, ...], files: Any, teachers: Any, tmp_path: Path, subtests: Any
) -> None:
    saved, refused, cells = [], 0, [(tuning, subset) for tuning in tunings for subset in subsets_of(task, tuning)]
    for tuning, subset in cells:
        if refuses(tuning, subset):
            refused += 1
            with pytest.raises(ConfigError, match=f"^tuning={tuning} and "):
                refuse_conflicts(build(task, tuning, subset, files, "teacher").stages)
            continue
        name = "+".join((tuning, *subset)).replace("/", ".")
        with subtests.test(f"{task} x {name}"):
            saved.append(run_one(task, tuning, subset, tmp_path / name, files, teachers))
    check_in_a_fresh_process(saved)
    assert len(saved) == len(cells) - refused
    print(f"{task} x {', '.join(tunings)}: {len(saved)} work, {refused} are refused")


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
