"""The order of a run, which only this file knows: load, shape, tune, weights, fit, fold, convert, save, measure,
export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from torch import nn

from niwaki import artifact
from niwaki.console import Console
from niwaki.data.corpus import Corpus
from niwaki.export import exports
from niwaki.export.export import ExportError
from niwaki.fit import Work, fit
from niwaki.measure import sides
from niwaki.model.anatomy import Anatomy
from niwaki.model.capture import Seen, outline
from niwaki.model.load import Pretrained, located
from niwaki.model.teacher import (
    LooksInside,
    Taught,
    Teachers,
    Uncut,
    check_reads,
    check_stranger,
    check_teacher,
    outline_of_teacher,
    the_one,
)
from niwaki.recipe import Recipe
from niwaki.stage import Context, Phase, Stage, Trims, refuse_conflicts
from niwaki.weights import fold


def run(recipe: Recipe, folder: Path, config: Mapping[str, Any], *, resume: bool = False) -> dict[str, Any]:
    """Carry out a recipe; the run folder gets its config, checkpoints, artifact, metrics and report.

    Raises:
        UserError: the recipe, the data or the model cannot be used; nothing was written then.
    """
    console = Console()
    corpus, empty = judge(recipe)
    check_teachers(recipe, corpus, empty)
    console.plan(recipe, corpus)

    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    recipe.task.begin(model, corpus.as_loaded)
    before = sides.before(recipe, corpus.as_loaded, model, folder)
    work = assemble(recipe, corpus, model)
    console.learning(model)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    fitted = fit(recipe, corpus, work, folder, config, resume=resume)
    recipe.task.refit(model, corpus)  # before what comes after the fit, which may look at predictions,
    settle(recipe, work)
    recipe.task.refit(model, corpus)  # and in what that left of the model
    fold_and_convert(recipe, work)
    artifact.save(
        folder / "model", model=model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits, columns=corpus.columns, store=recipe.store,
    )  # fmt: skip
    facts = {**fitted.facts(), **work.context.facts}
    metrics = sides.compare(recipe, corpus, model, folder, before, facts, list(work.context.targets))
    sides.write(folder, metrics, config)  # before the exports: whatever becomes of them, these numbers stay
    failures = export(recipe, corpus, folder, metrics, config)
    if not failures:
        time_all(recipe, corpus, folder, metrics, config)
    fitted.close(metrics)
    console.result(metrics, folder)
    if failures:
        raise ExportError("; ".join(map(str, failures)))
    return metrics


def export(
    recipe: Recipe, corpus: Corpus, folder: Path, metrics: dict[str, Any], config: Mapping[str, Any]
) -> list[ExportError]:
    """Write the artifact in other formats, each evaluated as exported; their numbers join the metrics. Returns what
    is wrong with those that are not good, of which no folder is left."""
    if not recipe.export:
        return []
    rows = exports.Rows(corpus, metrics["after"]["test"], recipe.measure.repeats)
    found, failures = exports.export_all(recipe.export.values(), folder / "model", folder / "exports", rows)
    metrics["exports"] = sides.clean(found)
    sides.write(folder, metrics, config)
    return failures


def time_all(recipe: Recipe, corpus: Corpus, folder: Path, metrics: dict[str, Any], config: Mapping[str, Any]) -> None:
    """The table of all forms of the model, where it is asked for, joins the metrics."""
    if not recipe.measure.table:
        return
    from niwaki.measure.speed_table import speed_table

    metrics["speed"] = sides.clean(speed_table(recipe, corpus, folder, recipe.measure.repeats))
    sides.write(folder, metrics, config)


def judge(recipe: Recipe) -> tuple[Corpus, Anatomy]:
    """Refuse what can be refused before weights are loaded, teachers aside; the data, and the model without weights."""
    refuse_conflicts(recipe.stages)
    recipe.trainer.prepare()
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = read(recipe)
    for stage in recipe.stages:
        stage.check_steps(recipe.trainer.steps(len(corpus.training())))
    empty = check_on_empty_model(recipe, corpus.labels, corpus.tokens)
    for one in recipe.export.values():
        one.check(recipe.task, empty)
    return corpus, empty


def read(recipe: Recipe) -> Corpus:
    """The data, in the tokens that the shaped model will read."""
    recipe.model.learn(recipe.data, recipe.task.needs, recipe.seed)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    for stage in recipe.stages:
        if isinstance(stage, Trims):
            corpus = corpus.trimmed(stage.kept_tokens(corpus, recipe.model.config()))
    return corpus


def assemble(recipe: Recipe, corpus: Corpus, model: Any) -> Work:
    """Everything between load and fit: vocabulary, shape, tune, weights, objective."""
    context = context_of(recipe, corpus, model)
    work = Work(model, model.config.to_dict(), context)
    work.edits += recipe.model.cut(model)
    for stage in (*of_phase(recipe, Phase.VOCABULARY), *of_phase(recipe, Phase.SHAPE)):
        work.add(stage.prepare(model, context))
    work.edits += recipe.tuning.grow(model, context.anatomy)
    context.targets.update(context.anatomy.linears())
    for stage in recipe.stages:  # again: a shape may have been read from the weights
        if stage.phase.acts_on_weights:
            stage.check(context.anatomy, context.targets)
    work.add(recipe.tuning.prepare(model, context))
    stack(recipe, work, during_fit=True)
    for stage in of_phase(recipe, Phase.OBJECTIVE):
        work.add(stage.prepare(model, context))
    recipe.optimizer.rates(model)  # refuses those without effect
    return work


def check_on_empty_model(recipe: Recipe, labels: Sequence[str], tokens: Sequence[int] = ()) -> Anatomy:
    """Let the task and every stage look at a model of the right shapes without weights, before any is loaded; it.
    `tokens`: those that stay, where some go."""
    anatomy = Anatomy.of(recipe.model.empty(recipe.task, labels))
    recipe.tuning.grow(anatomy.model, anatomy)  # first, since a task may have fewer positions then
    recipe.task.check(anatomy)
    for stage in recipe.stages:
        stage.check(anatomy, anatomy.linears())
        stage.outline(anatomy.model)
        if tokens and isinstance(stage, Trims):
            stage.trim(anatomy.model, tokens)
    return Anatomy.of(anatomy.model)


def check_teachers(recipe: Recipe, corpus: Corpus, student: Anatomy, *, yet_to_come: str | None = None) -> None:
    """Look at what the teachers say of themselves, and at their shapes beside those of the empty student, before
    weights are loaded; at all but one that is `yet_to_come`."""
    vocabulary, taught = corpus.tokenizer.get_vocab(), [s for s in recipe.stages if isinstance(s, Taught)]
    for stage in taught:
        for field, place in stage.teachers().items():
            if place == yet_to_come:
                continue
            if stage.own_tokens:
                check_stranger(place, recipe.task, corpus.labels, vocabulary, field)
            else:
                check_teacher(place, recipe.task, corpus.labels, vocabulary, field, uncut(corpus))
            check_reads(place, recipe.task, student, field, stage)
    looking = [stage for stage in recipe.stages if isinstance(stage, LooksInside)]
    ours = outline(student) if looking else None
    theirs: dict[str, Seen] = {}
    for one in looking:
        assert ours is not None
        place = one.teacher or the_one(taught)
        if place == yet_to_come:
            continue
        if place not in theirs:
            theirs[place] = outline_of_teacher(place, recipe.task, corpus.labels)
        one.compare_outlines(ours, theirs[place])


def uncut(corpus: Corpus) -> Uncut | None:
    """The vocabulary that the student had before tokens were left out, where some were: a teacher may have it still."""
    return Uncut(corpus.whole.tokenizer.get_vocab(), corpus.tokens) if corpus.whole else None


def context_of(recipe: Recipe, corpus: Corpus, model: nn.Module) -> Context:
    """What the stages may know of this run."""
    vocabulary, batches = corpus.tokenizer.get_vocab(), len(corpus.training())
    return Context(
        anatomy=Anatomy.of(model),
        targets={},
        steps=recipe.trainer.steps(batches),
        epoch=recipe.trainer.epoch(batches),
        seed=recipe.seed,
        head_learns=recipe.task.head_learns or getattr(model, "head_is_new", False),
        predictions=recipe.task.predictions,
        owners=recipe.task.owners,
        load_teacher=Teachers(recipe.stages, recipe.task, corpus.labels, vocabulary, uncut(corpus)),
        token_ids=lambda text: corpus.tokenizer(text, add_special_tokens=False)["input_ids"],
        calibration=corpus.calibration,
        training=corpus.numbered,
        training_key=corpus.training_key,
        read_by=lambda place: corpus.read_by(Pretrained(name=located(place, "teacher")).tokenizer()),
        inputs=recipe.task.inputs,
        tokens=corpus.tokens,
        loss=lambda model, batch: recipe.task.loss(model(**recipe.task.inputs(batch)), batch),
        write=recipe.task.write,
        retold=recipe.task.retold,
        writing=recipe.task.writing,
    )


def of_phase(recipe: Recipe, phase: Phase) -> list[Stage]:
    """The stages of one phase."""
    return [stage for stage in recipe.stages if stage.phase is phase]


def stack(recipe: Recipe, work: Work, *, during_fit: bool) -> None:
    """Stack the links of the weight methods that the fit runs through, or of those that come after it. The tuning's
    delta, where there is one, goes below those of the linears."""
    stages = [s for s in recipe.stages if s.phase.acts_on_weights and s.during_fit is during_fit]
    if any(stage.acts_on_linears for stage in stages):
        recipe.tuning.link(work.model, work.context)
    for stage in stages:
        work.add(stage.prepare(work.model, work.context))


def settle(recipe: Recipe, work: Work) -> None:
    """After the fit: the post-training methods take their place in the chains."""
    work.model.eval()
    stack(recipe, work, during_fit=False)


def fold_and_convert(recipe: Recipe, work: Work) -> None:
    """Bake the chains, merge what is left of the adapters, and put real integers where there were grids."""
    work.context.records.update(fold({**work.context.targets, **work.context.tables}))
    for stage in sorted(recipe.stages, key=lambda stage: stage.phase is not Phase.TUNE):  # shapes are cut of the sum
        work.edits += stage.finalize(work.model, work.context)
