"""Every method of pruning, sharing, factorisation and distillation x {full, lora} x {alone, quantize/qat} x task, and
every pair of them, on tiny random models: trains, resumes, folds, is saved and reloaded with the same logits, or is
refused before loading."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from lifecycle import TASKS, check_in_a_fresh_process, live, look, recipe_of, write_rows, write_teachers

from niwaki.combinations import names
from niwaki.errors import ConfigError
from niwaki.recipe import Recipe

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
    ("share/embeddings",): "has no output layer",
}
ELSEWHERE = ("distill/cross_vocabulary", "distill/on_policy")  # of other tokens, for language models: their own tests
METHODS = [name for name in names("compression") if not name.startswith("quantize/") and name not in ELSEWHERE]
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
@pytest.mark.parametrize("task", TASKS)
def test_methods_work_or_are_refused(
    task: str, method: str, files: dict[str, str], teachers: dict[str, str], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    saved, refused = [], 0
    for tuning, more in CELLS:
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
    check_in_a_fresh_process(saved)
    assert len(saved) == len(CELLS) - refused


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
