"""What combines with what: the rules, the page made of them, and that each answer is true of a real run."""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import begin, check_in_a_fresh_process, finish, recipe_of, train, write_rows

from niwaki import combinations
from niwaki.combinations import Combination
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.model.tiny import FAMILIES
from niwaki.recipe import Recipe

COMPRESSIONS = [(), ("prune/magnitude",), ("quantize/qat",), ("prune/magnitude", "quantize/qat")]
# All of them take long: `make grid`. Otherwise those cells of a diagonal, which has every pair of a family
# with a tuning, of a family with a set of compressions, and of a tuning with a task.
WHOLE = os.environ.get("NIWAKI_GRID") == "whole"


def chosen(family: str) -> list[Combination]:
    """The combinations of a family that are run."""
    tunings, tasks = combinations.names("tuning"), combinations.KINDS
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
def around(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """For each task, the axes that are no part of a combination."""
    files = write_rows(tmp_path_factory.mktemp("rows"), count=12)
    return {task: recipe_of(task, path, "trainer=cpu") for task, path in files.items()}


def run(cell: Combination, rest: Recipe, folder: Path) -> Path:
    """Train, resume, fold, convert, save, reload: each as promised, and the weights too. The folder of the artifact."""
    recipe = replace(rest, model=cell.recipe.model, tuning=cell.recipe.tuning, compression=cell.recipe.compression)
    corpus, work = begin(recipe)
    start = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    train(recipe, corpus, work, folder)
    moved = {n for n, p in work.model.named_parameters() if not torch.equal(p, start[n])}
    # VeRA's d learns through b, which starts at zero: in a few steps its gradient may be below what shows in fp32.
    learning = {n for n, p in work.model.named_parameters() if p.requires_grad}
    assert moved <= learning
    assert not [name for name in learning - moved if "vera_lambda_d" not in name]
    saved = finish(recipe, corpus, work, folder)
    for name in work.context.targets if cell.compression else ():
        module: Any = saved.model.get_submodule(name)
        quantized = "quantize/qat" in cell.compression
        assert isinstance(module, IntegerLinear) == quantized
        weight = module.dequantized() if quantized else module.weight
        assert torch.equal(weight, saved.folded[name])
        if "prune/magnitude" in cell.compression:
            assert int((weight == 0).sum()) >= round(0.5 * weight.numel())
    return saved.folder


@pytest.mark.parametrize("family", FAMILIES)
def test_each_works_or_is_refused(family: str, around: dict[str, Recipe], tmp_path: Path, subtests: Any) -> None:
    refused, saved = 0, []
    for number, cell in enumerate(chosen(family)):
        with subtests.test(f"{cell.task} x {cell.tuning} x {'+'.join(cell.compression) or 'dense'}"):
            if cell.refusal() is not None:
                refused += 1
                continue
            saved.append(run(cell, around[cell.task], tmp_path / str(number)))
            shutil.rmtree(tmp_path / str(number) / "checkpoints")
    check_in_a_fresh_process(saved)
    print(f"{family}: {len(saved)} work, {refused} are refused")
    assert len(saved) + refused == len(chosen(family))


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
    tunings, tasks = combinations.names("tuning"), combinations.KINDS
    assert {(c.family, c.tuning) for c in cells} == set(itertools.product(FAMILIES, tunings))
    assert {(c.family, c.compression) for c in cells} == set(itertools.product(FAMILIES, COMPRESSIONS))
    assert {(c.tuning, c.task) for c in cells} == set(itertools.product(tunings, tasks))


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[1] / "docs" / "combinations.md"
    assert page.read_text(encoding="utf-8") == combinations.page() + "\n", "run `make docs`"
