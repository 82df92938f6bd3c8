"""The order of a run: load, shape, tune, weights, fit, fold, convert, save, reload, measure. Only this file knows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from torch import nn

from niwaki import artifact
from niwaki.console import Console
from niwaki.data.corpus import Corpus
from niwaki.edits import Edit
from niwaki.fit import fit
from niwaki.measure import sides
from niwaki.model.anatomy import Anatomy
from niwaki.model.teacher import load_teacher
from niwaki.recipe import Recipe
from niwaki.stage import Context, Effects, Phase, Stage, refuse_conflicts
from niwaki.weights import fold


def run(recipe: Recipe, folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> dict[str, Any]:
    """Carry out a recipe; the run folder gets its config, checkpoints, artifact, metrics and report.

    Raises:
        UserError: the recipe, the data or the model cannot be used; nothing was written then.
    """
    console = Console()
    refuse_conflicts(recipe.stages)
    recipe.trainer.prepare()
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    check_on_empty_model(recipe, corpus)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    console.plan(recipe, corpus)

    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)  # load
    base_config = model.config.to_dict()
    before = sides.before(recipe, corpus, model, folder)
    edits = recipe.model.cut(model)  # shape
    context = context_of(recipe, corpus, model)
    effects = [stage.prepare(model, context) for stage in of_phase(recipe, Phase.SHAPE)]
    context.targets.update(context.anatomy.linears())
    effects.append(recipe.tuning.prepare(model, context))  # tune
    effects += stack(recipe, model, context, during_fit=True)  # weights
    effects += [stage.prepare(model, context) for stage in of_phase(recipe, Phase.OBJECTIVE)]
    console.learning(model)
    fitted = fit(recipe, corpus, model, effects, folder, config, steps=context.steps, resume=resume)
    stack(recipe, model, context, during_fit=False)
    edits += fold_and_convert(recipe, model, context)
    artifact.save(
        folder / "model", model=model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=base_config, edits=edits,
    )  # fmt: skip
    metrics = sides.compare(recipe, corpus, model, folder, before, fitted.facts(), list(context.targets))
    sides.write(folder, metrics, config)
    fitted.close(metrics)
    console.result(metrics, folder)
    return metrics


def check_on_empty_model(recipe: Recipe, corpus: Corpus) -> None:
    """Let every stage look at a model of the right shapes without weights, before weights are loaded."""
    anatomy = Anatomy.of(recipe.model.empty(recipe.task, corpus.labels))
    for stage in recipe.stages:
        stage.check(anatomy, anatomy.linears())


def context_of(recipe: Recipe, corpus: Corpus, model: nn.Module) -> Context:
    """What the stages may know of this run."""
    vocabulary = corpus.tokenizer.get_vocab()
    return Context(
        anatomy=Anatomy.of(model),
        targets={},
        steps=recipe.trainer.steps(len(corpus.training())),
        seed=recipe.seed,
        head_learns=recipe.task.head_learns,
        predictions=recipe.task.predictions,
        load_teacher=lambda place: load_teacher(place, recipe.task, corpus.labels, vocabulary),
    )


def of_phase(recipe: Recipe, phase: Phase) -> list[Stage]:
    """The stages of one phase."""
    return [stage for stage in recipe.stages if stage.phase is phase]


def stack(recipe: Recipe, model: nn.Module, context: Context, *, during_fit: bool) -> list[Effects]:
    """Stack the links of the weight methods that the fit runs through, or of those that come after it. The tuning's
    delta, where there is one, goes below them."""
    stages = [s for s in recipe.stages if s.phase.acts_on_weights and s.during_fit is during_fit]
    if stages:
        recipe.tuning.link(model, context)
    return [stage.prepare(model, context) for stage in stages]


def fold_and_convert(recipe: Recipe, model: nn.Module, context: Context) -> list[Edit]:
    """Bake the chains, merge what is left of the adapters, and put real integers where there were grids."""
    model.eval()
    context.records.update(fold(context.targets))
    return [edit for stage in recipe.stages for edit in stage.finalize(model, context)]
