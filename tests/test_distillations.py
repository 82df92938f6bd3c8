"""What learns beside a student: maps to the teacher's width, which train and leave no trace; and all terms at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import FURTHER, TASKS, begin, beside, finish, recipe_of, train, write_rows, write_teachers

from niwaki.combinations import names
from niwaki.fit import fit

ELSEWHERE = ("distill/cross_vocabulary", "distill/on_policy", "distill/sequence")  # of some tasks: their own tests
METHODS = [name for name in names("compression") if name.startswith("distill/") and name not in ELSEWHERE]
PROJECTED = {"distill/hidden": 2, "distill/cosine": 1, "distill/pkd": 1}  # learned maps to the teacher's width


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def teachers(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_teachers(files, tmp_path_factory.mktemp("teachers"), larger=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [*TASKS, *FURTHER])
def test_projections_learn_and_leave_no_trace(
    task: str, method: str, files: dict[str, str], teachers: dict[str, str], tmp_path: Path
) -> None:
    place = f"compression.{method.rpartition('/')[2]}.teacher={teachers[task]}"
    recipe = recipe_of(task, files[task], f"compression=[{method}]", place)
    plain = {name for name, _ in recipe.model.empty(recipe.task, ("a", "b", "c")).named_modules()}
    corpus, work = begin(recipe)
    start = {name: p.detach().clone() for name, p in beside(work).items()}
    stacks = 2 if task == "translation" and method != "distill/cosine" else 1
    assert len(start) == stacks * PROJECTED.get(method, 0)
    train(recipe, corpus, work, tmp_path)
    assert not [name for name, p in beside(work).items() if torch.equal(p, start[name])]
    saved = finish(recipe, corpus, work, tmp_path)
    assert {name for name, _ in saved.model.named_modules()} == plain


def test_all_together_with_one_teacher(files: dict[str, str], teachers: dict[str, str], tmp_path: Path) -> None:
    """Every term at once; one of them names the teacher."""
    settings = ["tuning=lora", f"compression=[{','.join(METHODS)}]", "compression.minilm.precision=bf16"]
    place = f"compression.minilm.teacher={teachers['classification']}"
    recipe = recipe_of("classification", files["classification"], *settings, place)
    corpus, work = begin(recipe)
    terms: dict[str, Any] = work.terms
    assert set(terms) == set(METHODS)
    assert len({id(term.teacher) for term in terms.values()}) == 1
    fit(recipe, corpus, work, tmp_path, {}, resume=False)
    assert all(torch.isfinite(p).all() for p in work.model.parameters())
