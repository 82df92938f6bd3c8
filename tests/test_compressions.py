"""Every method of pruning, sharing, factorisation and distillation x {full, lora} x {alone, quantize/qat} x task, and
every pair of them, on tiny random models: trains, resumes, folds, is saved and reloaded with the same logits, or is
refused before loading. What is reloaded shows what the method did."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import FURTHER, TASKS, check_in_a_fresh_process, live, look, recipe_of, write_rows, write_teachers

from niwaki import artifact
from niwaki.combinations import names
from niwaki.compression.factorize.low_rank import LowRankLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.embeddings import FactorizedEmbedding, is_tied, table_of
from niwaki.model.units import Kind, units_of
from niwaki.recipe import Recipe
from niwaki.weights import to_dense

SETTINGS: dict[str, list[str]] = {  # of the methods that show more than their defaults do, without "compression."
    "prune/cofi": ["cofi.teacher={teacher}", "cofi.masks=[heads,neurons,hidden]"],
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
    **{
        name: [f"{name.rpartition('/')[2]}.teacher={{teacher}}"]
        for name in names("compression")
        if name.startswith("distill/")
    },
}
REFUSED: dict[tuple[str, ...], str] = {  # (method, another method or tuning ...): what the refusal says
    # Those of an untied model: tests/compression/share/test_embeddings.py
    ("share/embeddings", "causal_lm"): "tied to its embeddings already",
    ("share/embeddings", "masked_lm"): "tied to its embeddings already",
    ("share/embeddings", "translation"): "tied to its embeddings already",
    ("share/embeddings",): "has no output layer",
}
ELSEWHERE = ("distill/cross_vocabulary", "distill/on_policy", "distill/sequence")  # of some tasks: their own tests
METHODS = [name for name in names("compression") if not name.startswith("quantize/") and name not in ELSEWHERE]


def weights(model: Any) -> list[torch.Tensor]:
    """Those of the linears of the blocks, dense."""
    to_dense(model)
    return [linear.weight.detach() for linear in Anatomy.of(model).linears().values()]


def zeros(model: Any) -> set[float]:
    """The shares of zeros that its linears have."""
    return {round(float((weight == 0).float().mean()), 2) for weight in weights(model)}


def units(model: Any, kind: Kind) -> int:
    """How many heads or neurons it has."""
    return sum(found.count for found in units_of(Anatomy.of(model), kind))


def size(model: Any) -> int:
    """Its weights in linears of the blocks."""
    return sum(weight.numel() for weight in weights(model))


def zero_blocks(model: Any) -> set[float]:
    """The shares of 2 x 2 blocks of zeros."""
    parted = [weight.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)) for weight in weights(model)]
    return {float((blocks == 0).all(3).all(1).float().mean()) for blocks in parted}


def by_fours(model: Any) -> bool:
    """Whether two of every four neighbours along the input are zero."""
    return all(bool(((weight.unflatten(1, (-1, 4)) == 0).sum(2) >= 2).all()) for weight in weights(model))


# What the reloaded model shows of a method, beside one of the same run without it (model, plain).
SHOWS: dict[str, Callable[[Any, Any], bool]] = {
    "prune/cofi": lambda model, plain: size(model) < 0.75 * size(plain),
    "prune/heads": lambda model, plain: units(model, "heads") == units(plain, "heads") / 2,
    "prune/neurons": lambda model, plain: units(model, "neurons") == units(plain, "neurons") / 2,
    "prune/width": lambda model, plain: 2 * table_of(model).embedding_dim == table_of(plain).embedding_dim,
    "prune/layers": lambda model, plain: len(Anatomy.of(model).blocks) < len(Anatomy.of(plain).blocks),
    "prune/vocabulary": lambda model, plain: table_of(model).num_embeddings < table_of(plain).num_embeddings,
    "prune/magnitude": lambda model, plain: zeros(model) == {0.5},
    "prune/random": lambda model, plain: zeros(model) == {0.5},
    "prune/taylor": lambda model, plain: zero_blocks(model) == {0.5},
    "prune/movement": lambda model, plain: zeros(model) == {0.0, 0.5},
    "prune/soft_movement": lambda model, plain: max(zeros(model)) > 0,
    "prune/wanda": lambda model, plain: all(
        bool(((w == 0).sum(1) == round(0.3 * w.shape[1])).all()) for w in weights(model)
    ),
    "prune/sparsegpt": lambda model, plain: by_fours(model),
    "factorize/svd": lambda model, plain: (
        any(isinstance(m, LowRankLinear) for m in model.modules()) and size(model) < size(plain)
    ),
    "factorize/embeddings": lambda model, plain: (
        isinstance(model.get_input_embeddings(), FactorizedEmbedding)
        and 4 * table_of(model).weight.numel() == table_of(plain).weight.numel()
    ),
    "share/codebook": lambda model, plain: all(len(weight.unique()) <= 16 for weight in weights(model)),
    "share/embeddings": lambda model, plain: is_tied(model) and not is_tied(plain),
    "share/layers": lambda model, plain: len(Anatomy.of(model).blocks) < len(Anatomy.of(plain).blocks),
    **{
        name: lambda model, plain: not any(map(torch.equal, weights(model), weights(plain)))  # it learned otherwise
        for name in METHODS
        if name.startswith("distill/")
    },
}
CELLS = [(tuning, more) for tuning in ("full", "lora") for more in ((), ("quantize/qat",))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def teachers(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_teachers(files, tmp_path_factory.mktemp("teachers"), larger=True)


def build(task: str, tuning: str, chosen: tuple[str, ...], path: str, teacher: str) -> Recipe:
    settings = [setting.format(teacher=teacher) for name in chosen for setting in SETTINGS.get(name, [])]
    return recipe_of(
        task, path, f"tuning={tuning}", f"compression=[{','.join(chosen)}]", *(f"compression.{s}" for s in settings)
    )


def pairs() -> list[tuple[str, str]]:
    """Methods that are run together: each with the next one of the list, or with every other (`make grid`)."""
    if os.environ.get("NIWAKI_GRID") == "whole":
        return list(itertools.combinations(METHODS, 2))
    return list(zip(METHODS, [*METHODS[1:], METHODS[0]], strict=True))


@pytest.fixture(scope="module")
def plain(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """`plain(task, tuning)`: the model of a run without compression."""
    runs: dict[tuple[str, str], Path] = {}

    def model(task: str, tuning: str) -> Any:
        if (task, tuning) not in runs:
            folder = tmp_path_factory.mktemp("plain")
            runs[task, tuning] = live(build(task, tuning, (), files[task], ""), folder)
        return artifact.load(runs[task, tuning]).model

    return model


def refusal(recipe: Recipe) -> str | None:
    """Why a recipe is refused before any weight is loaded."""
    try:
        look(recipe)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("pair", pairs(), ids="+".join)
def test_pairs_work_or_are_refused(
    pair: tuple[str, str], tuning: str, files: dict[str, str], teachers: dict[str, str], tmp_path: Path
) -> None:
    recipe = build("classification", tuning, pair, files["classification"], teachers["classification"])
    reason = refusal(recipe)
    if reason is None:
        live(recipe, tmp_path)
    else:
        assert any(one.rpartition("/")[2] in reason for one in pair)
        assert "\n" not in reason
    print(f"{'+'.join(pair)} x {tuning}: {reason or 'works'}")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [*TASKS, *FURTHER])  # the last ones in one cell of each
def test_methods_work_or_are_refused(
    task: str, method: str, files: dict[str, str], teachers: dict[str, str], tmp_path: Path, subtests: pytest.Subtests,
    plain: Callable[[str, str], Any],
) -> None:  # fmt: skip
    saved, refused = [], 0
    cells = CELLS if task in TASKS else [CELLS[METHODS.index(method) % len(CELLS)]]
    for tuning, more in cells:
        chosen = (method, *more)
        name = "+".join((tuning, *chosen)).replace("/", ".")
        reason = next((why for key, why in REFUSED.items() if set(key) <= {task, tuning, *chosen}), None)
        recipe = build(task, tuning, chosen, files[task], teachers[task])
        with subtests.test(f"{task} x {name}"):
            if reason:
                refused += 1
                with pytest.raises(ConfigError, match=reason):
                    look(recipe)
            else:
                saved.append(live(recipe, tmp_path / name))
                if not more:
                    assert SHOWS[method](artifact.load(saved[-1]).model, plain(task, tuning))
    if task in TASKS:
        check_in_a_fresh_process(saved)
    assert len(saved) == len(cells) - refused


def test_a_run_without_compression_shows_nothing_of_it(plain: Callable[[str, str], Any]) -> None:
    """So that a method which does nothing is found out."""
    assert set(SHOWS) == set(METHODS)
    shown = [
        name for name, shows in SHOWS.items() if shows(plain("classification", "full"), plain("classification", "full"))
    ]
    assert shown == []


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_pattern_below_integers_survives_the_merge(method: str, files: dict[str, str], tmp_path: Path) -> None:
    """Masks act on the sum of base and delta, and integers have a zero: two of four codes are zero in the file."""
    chosen = [f"compression=[prune/{method},quantize/qat]", f"compression.{method}.pattern='2:4'"]
    recipe = recipe_of("classification", files["classification"], "tuning=lora", *chosen)
    saved = artifact.load(live(recipe, tmp_path)).model
    codes = [module.integers() for module in saved.modules() if hasattr(module, "integers")]
    assert len(codes) == 18
    assert all(bool(((its.unflatten(1, (-1, 4)) == 0).sum(2) >= 2).all()) for its in codes)
    assert by_fours(saved)


NARROW = {  # of tunings whose defaults are for wider models
    "fourierft": "tuning.frequencies=20", "oft": "tuning.block=2", "boft": "tuning.block=2", "top": "tuning.blocks=1",
}  # fmt: skip
OTHERS = [name for name in names("tuning") if name not in ("full", "lora")]


def with_tunings() -> list[tuple[str, str]]:
    """Methods with the other tunings: each with one of them, or with all (`make grid`)."""
    if os.environ.get("NIWAKI_GRID") == "whole":
        return list(itertools.product(METHODS, OTHERS))
    return [(method, OTHERS[place % len(OTHERS)]) for place, method in enumerate(METHODS)]


@pytest.mark.parametrize(("method", "tuning"), with_tunings(), ids="+".join)
def test_methods_and_tunings_work_or_are_refused(
    method: str, tuning: str, files: dict[str, str], teachers: dict[str, str], tmp_path: Path
) -> None:
    settings = [one.format(teacher=teachers["classification"]) for one in SETTINGS.get(method, [])]
    recipe = recipe_of(
        "classification", files["classification"], f"tuning={tuning}", *([NARROW[tuning]] if tuning in NARROW else []),
        f"compression=[{method}]", *(f"compression.{setting}" for setting in settings),
    )  # fmt: skip
    reason = refusal(recipe)
    if reason is None:
        live(recipe, tmp_path)
    else:
        assert method.rpartition("/")[2] in reason
        assert "\n" not in reason
    print(f"{method} x {tuning}: {reason or 'works'}")
