"""What combines with what: the rules, the page made of them, and that each answer is true of a real run."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from niwaki import artifact, combinations, compose
from niwaki.combinations import Combination
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.data.corpus import Corpus
from niwaki.fit import Work, fit
from niwaki.model.tiny import FAMILIES
from niwaki.pipeline import assemble, fold_and_convert, settle
from niwaki.recipe import Recipe
from niwaki.weights import fold

COMPRESSIONS = [(), ("prune/magnitude",), ("quantize/qat",), ("prune/magnitude", "quantize/qat")]
# Codes and scales are the fold's own, bit for bit. A sum that rounds the other way moves a rounded activation by one
# code, 1/127 of its largest value: up to 0.07 in T5's logits, which are around 13, and 0 where activations stay as they
# are.
CONVERT_BOUND = 0.02  # or 0.01 of the largest logit
# All of them take long: `make grid`. Otherwise those cells of a diagonal, which has every pair of a family
# with a tuning, of a family with a set of compressions, and of a tuning with a task.
WHOLE = os.environ.get("NIWAKI_GRID") == "whole"


def chosen(family: str) -> list[Combination]:
    """The combinations of a family that are run."""
    tunings, tasks = combinations.names("tuning"), combinations.names("task")
    if WHOLE:
        every = itertools.product(tasks, tunings, COMPRESSIONS)
        return [Combination(task=one, family=family, tuning=two, compression=three) for one, two, three in every]
    shift = list(FAMILIES).index(family)
    return [
        Combination(
            task=tasks[(position + shift) % len(tasks)], family=family, tuning=tuning,
            compression=COMPRESSIONS[(position // len(tasks) + shift) % len(COMPRESSIONS)],
        )
        for position, tuning in enumerate(tunings)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A few rows for each task."""
    folder = tmp_path_factory.mktemp("combinations")
    words = ["a rose is red", "the sky is blue", "green grass grows here", "red and blue make violet"]
    texts = [f"{words[i % 4]} {words[i // 4 % 4]} {i}" for i in range(12)]
    rows = {
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
def around(files: dict[str, str]) -> dict[str, Recipe]:
    """For each task, the axes that are no part of a combination."""
    common = ["trainer=cpu", "trainer.precision=fp32", "trainer.max_steps=3", "logger=none", "callbacks=[]"]
    return {
        task: compose.build(
            compose.compose(
                [
                    *common, f"task={task}", "task.max_length=32", "data=files", "data.batch_size=4",
                    *(f"data.{split}={path}" for split in ("train", "validation", "test")), "optimizer.lr=1e-3",
                ]
            ).config
        )
        for task, path in files.items()
    }  # fmt: skip


def recipe_of(cell: Combination, around: dict[str, Recipe]) -> Recipe:
    rest = around[cell.task]
    return replace(rest, model=cell.recipe.model, tuning=cell.recipe.tuning, compression=cell.recipe.compression)


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs).logits.clone()


def run(cell: Combination, recipe: Recipe, folder: Path) -> None:
    """Train, fold, convert, save, reload: each as promised."""
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    work = assemble(recipe, corpus, model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(recipe, corpus, work, folder, {}, resume=False)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved
    assert moved <= learning
    settle(recipe, work)
    inputs = recipe.task.inputs(next(iter(corpus.evaluation("test"))))
    stacked = logits(model, inputs)
    work.context.records.update(fold(work.context.targets))
    assert torch.equal(logits(model, inputs), stacked)
    folded = {name: linear.weight.detach().clone() for name, linear in work.context.targets.items()}
    fold_and_convert(recipe, work)  # nothing is left to fold: converts alone
    converted = logits(model, inputs)
    assert bool(torch.isfinite(converted).all())
    quantized = "quantize/qat" in cell.compression
    bound = max(CONVERT_BOUND, 0.01 * float(stacked.abs().max())) if quantized else 1e-5
    assert float((converted - stacked).abs().max()) <= bound
    check_saved(cell, recipe, corpus, work, folder / "model", inputs, converted, folded)


def check_saved(
    cell: Combination,
    recipe: Recipe,
    corpus: Corpus,
    work: Work,
    folder: Path,
    inputs: Any,
    expected: torch.Tensor,
    folded: dict[str, torch.Tensor],
) -> None:
    """The artifact says the same, and its weights are what was promised."""
    artifact.save(
        folder, model=work.model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits,
    )  # fmt: skip
    saved = artifact.load(folder).model
    assert torch.equal(logits(saved, inputs), expected)
    for name in work.context.targets if cell.compression else ():
        module: Any = saved.get_submodule(name)
        quantized = "quantize/qat" in cell.compression
        assert isinstance(module, IntegerLinear) == quantized
        weight = module.dequantized() if quantized else module.weight
        assert torch.equal(weight, folded[name])
        if "prune/magnitude" in cell.compression:
            assert int((weight == 0).sum()) >= round(0.5 * weight.numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_works_or_is_refused(family: str, around: dict[str, Recipe], tmp_path: Path, subtests: Any) -> None:
    worked = refused = 0
    for number, cell in enumerate(chosen(family)):
        with subtests.test(f"{cell.task} x {cell.tuning} x {'+'.join(cell.compression) or 'dense'}"):
            if cell.refusal() is not None:
                refused += 1
                continue
            run(cell, recipe_of(cell, around), tmp_path / str(number))
            worked += 1
    print(f"{family}: {worked} work, {refused} are refused")
    assert worked + refused == len(chosen(family))


def test_what_is_refused_and_why() -> None:
    assert Combination().refusal() is None
    both = Combination(compression=("quantize/int8", "quantize/qat")).refusal()
    assert both is not None
    assert "quantize/int8 and quantize/qat: each puts the weights on its own grid" in both
    causal = Combination(task="causal_lm").refusal()
    assert causal is not None
    assert causal.startswith("task=causal_lm: needs a model that reads from left to right")


def test_the_diagonal_has_every_pair() -> None:
    if WHOLE:
        pytest.skip("all are run")
    cells = [cell for family in FAMILIES for cell in chosen(family)]
    tunings, tasks = combinations.names("tuning"), combinations.names("task")
    assert {(c.family, c.tuning) for c in cells} == set(itertools.product(FAMILIES, tunings))
    assert {(c.family, c.compression) for c in cells} == set(itertools.product(FAMILIES, COMPRESSIONS))
    assert {(c.tuning, c.task) for c in cells} == set(itertools.product(tunings, tasks))


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[1] / "docs" / "combinations.md"
    assert page.read_text(encoding="utf-8") == combinations.page() + "\n", "run `make docs`"
