"""Every method of quantization x {full, lora, adapter, prefix} x {alone, prune/magnitude, share/codebook} x task, and
below or beside every other method, on tiny random models: trains, resumes, folds, is saved and reloaded with the same
logits, or is refused before loading. What is reloaded has the codes that the fold had, and no zero is lost."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import (
    TASKS,
    begin,
    check_in_a_fresh_process,
    finish,
    look,
    recipe_of,
    train,
    write_rows,
    write_teachers,
)
from test_compressions import METHODS
from test_compressions import SETTINGS as OF_OTHERS

from niwaki.combinations import names
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.tables import IntegerTable
from niwaki.errors import ConfigError
from niwaki.recipe import Recipe
from niwaki.weights import packed

GROUP, ROWS = "{method}.group=16", "{method}.rows=9"
SETTINGS: dict[str, list[str]] = {  # where the defaults are for wider models and more rows, or show less
    "quantize/weight_only": [GROUP, "{method}.symmetric=false"],
    "quantize/gptq": [GROUP, ROWS],
    "quantize/awq": [GROUP, ROWS],
    "quantize/hqq": [GROUP],
    "quantize/mixed": [GROUP, ROWS],
    "quantize/smoothquant": [ROWS],
    "quantize/int8_static": [ROWS],
    "share/codebook": ["codebook.begin=0.34"],
    "quantize/qat": ["{method}.scale=lsq", "{method}.begin=0.34", "{method}.freeze=0.8"],
}
QUANTIZATIONS = [name for name in names("compression") if name.startswith("quantize/")]
EMBEDDINGS = "quantize/embeddings"  # whose linears stay as they are
TUNINGS = ("full", "lora", "adapter", "prefix")
BELOW = ((), ("prune/magnitude",), ("share/codebook",))
REFUSED: dict[str, set[tuple[str, ...]]] = {
    "quantize/binary": {("prune/magnitude",)},  # it has no zero
    **{  # each weight gets a code of its own
        f"quantize/{method}": {("share/codebook",)} for method in ("awq", "gptq", "int8_static", "mixed", "smoothquant")
    },
    **{f"quantize/{method}": {("share/codebook",)} for method in ("bf16", "float8")},  # two ways to store a weight
}
WHOLE = os.environ.get("NIWAKI_GRID") == "whole"


def settings_of(name: str, teacher: str = "") -> list[str]:
    """The settings of a method on a tiny model."""
    method = name.rpartition("/")[2]
    found = {**OF_OTHERS, **SETTINGS}.get(name, [])
    return [f"compression.{one.format(method=method, teacher=teacher)}" for one in found]


def build(task: str, tuning: str, chosen: tuple[str, ...], path: str, teacher: str = "") -> Recipe:
    settings = [setting for name in chosen for setting in settings_of(name, teacher)]
    return recipe_of(task, path, f"tuning={tuning}", f"compression=[{','.join(chosen)}]", *settings)


def refusal(recipe: Recipe) -> str | None:
    """Why a recipe is refused before any weight is loaded."""
    try:
        look(recipe)
    except ConfigError as error:
        return str(error)
    return None


def run(recipe: Recipe, folder: Path) -> Any:
    """Trained, resumed, folded, saved and reloaded, and what is packed in it, with what holds for every integer."""
    corpus, work = begin(recipe)
    train(recipe, corpus, work, folder)
    saved = finish(recipe, corpus, work, folder)
    stored = dict(packed(saved.model))
    assert stored
    for one in stored.values():
        if isinstance(one, IntegerLinear | IntegerTable):
            codes = one.integers()
            assert one.layout.lowest <= int(codes.min()) <= int(codes.max()) <= one.layout.highest
    return saved, stored


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def teachers(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_teachers(files, tmp_path_factory.mktemp("teachers"), larger=True)


def tasks_of(place: int) -> tuple[str, ...]:
    """All of them (`make grid`), or one in turn."""
    return TASKS if WHOLE else (TASKS[place % len(TASKS)],)


@pytest.mark.parametrize("method", QUANTIZATIONS)
def test_integers_on_a_tuned_pruned_or_shared_weight(
    method: str, files: dict[str, str], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    saved, refused = [], []
    cells = list(itertools.product(TUNINGS, BELOW))
    for place, (tuning, below) in enumerate(cells):
        for task in tasks_of(place + place // len(TASKS) + QUANTIZATIONS.index(method)):
            name = "+".join((task, tuning, *below)).replace("/", ".")
            with subtests.test(name):
                recipe = build(task, tuning, (*below, method), files[task])
                reason = refusal(recipe)
                if reason is not None:
                    refused.append((tuning, below))
                    assert method in reason
                    assert "\n" not in reason
                    continue
                done, stored = run(recipe, tmp_path / name)
                saved.append(done.folder)
                folded = done.folded
                assert method == EMBEDDINGS or set(folded) <= set(stored)
                for linear in set(folded) & set(stored):
                    assert torch.equal(stored[linear].dequantized(), folded[linear])
                if below == ("prune/magnitude",):
                    shares = [float((weight == 0).float().mean()) for weight in folded.values()]
                    assert min(shares) >= 0.5
                if below == ("share/codebook",) and GROUP not in SETTINGS.get(method, []):
                    assert max(len(row.unique()) for weight in folded.values() for row in weight) <= 16
    check_in_a_fresh_process(saved)
    print(f"{method}: {len(saved)} work, {len(refused)} are refused")
    assert {below for _, below in refused} == REFUSED.get(method, set())


def beside() -> list[tuple[str, str]]:
    """A method of quantization with another method: each with three of them in turn, or with all (`make grid`)."""
    if WHOLE:
        return list(itertools.product(QUANTIZATIONS, METHODS))
    count = len(METHODS)
    return [(one, METHODS[(3 * place + step) % count]) for place, one in enumerate(QUANTIZATIONS) for step in range(3)]


@pytest.mark.parametrize(("quantization", "method"), beside(), ids=str)
def test_integers_beside_other_methods(
    quantization: str, method: str, files: dict[str, str], teachers: dict[str, str], tmp_path: Path
) -> None:
    task = TASKS[(QUANTIZATIONS.index(quantization) + METHODS.index(method)) % len(TASKS)]
    recipe = build(task, "full", (method, quantization), files[task], teachers[task])
    reason = refusal(recipe)
    if reason is None:
        run(recipe, tmp_path)
    else:
        assert any(one.rpartition("/")[2] in reason for one in (quantization, method))
        assert "\n" not in reason
    print(f"{quantization} x {method}: {reason or 'works'}")


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name != "quantize/mixed"])  # which refuses
@pytest.mark.parametrize("method", ["prune/heads", "prune/cofi"])
def test_integers_of_what_is_cut_after_the_fit(
    quantization: str, method: str, files: dict[str, str], teachers: dict[str, str], tmp_path: Path
) -> None:
    """Codes, scales, zeros and factors are cut as the weight is."""
    name = quantization.rpartition("/")[2]
    whole = [f"compression.{name}.group=null"] if GROUP in SETTINGS.get(quantization, []) else []
    recipe = recipe_of(
        "classification", files["classification"], f"compression=[{method},{quantization}]",
        *settings_of(method, teachers["classification"]), *settings_of(quantization), *whole,
    )  # fmt: skip
    assert refusal(recipe) is None
    run(recipe, tmp_path)
