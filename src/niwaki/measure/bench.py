"""How much time a step costs above a bare PyTorch loop, and an epoch against Hugging Face's Trainer.

    python -m niwaki.measure.bench [--trainer FILE [--validation FILE --test FILE]] [--output FILE]

Step time: the fit of `train.py` (data loader, Lightning, the csv logger, progress, checkpoint and learning-rate
callbacks) and a bare loop take turns in one process, block by block, each with its own copy of the same model. The bare
loop gets the batches that the loader makes for the fit ready made, so its time has no loading in it.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.quiet import quiet_libraries, quiet_loggers

quiet_libraries()

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from niwaki import compose  # noqa: E402
from niwaki.data.batches import Batches  # noqa: E402
from niwaki.data.corpus import Corpus  # noqa: E402
from niwaki.errors import ConfigError, UserError  # noqa: E402
from niwaki.fit import callbacks_of, fit  # noqa: E402
from niwaki.measure.machine import machine, versions  # noqa: E402
from niwaki.module import Learner  # noqa: E402
from niwaki.pipeline import assemble  # noqa: E402
from niwaki.recipe import Recipe  # noqa: E402
from niwaki.study import quoted  # noqa: E402

LONG_ENOUGH = 0.1  # seconds; below that the fixed cost of a step says little about a real fit
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}


class BareLoop:
    """What one would write by hand: forward, loss, backward, clip, step."""

    def __init__(self, recipe: Recipe, model: nn.Module, steps: int) -> None:
        self.model = model.train()
        self.optimizer = recipe.optimizer.build(model, fused=True)
        self.scheduler = recipe.schedule.build(self.optimizer, steps)
        self._task = recipe.task
        self._clip = recipe.trainer.gradient_clip
        self._dtype = PRECISIONS[recipe.trainer.lightning_precision]

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step."""
        with torch.autocast("cpu", self._dtype) if self._dtype else nullcontext():
            loss = self._task.loss(self.model(**self._task.inputs(batch)), batch)
        self.optimizer.zero_grad()
        loss.backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.optimizer.step()
        self.scheduler.step()


class Repeated:
    """The first `count` batches of a loader, over as many of its epochs as that takes."""

    def __init__(self, loader: Batches, count: int) -> None:
        self._loader = loader
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return islice(chain.from_iterable(repeat(self._loader)), self._count)


@dataclass
class Turns(pl.Callback):
    """Lets a bare loop run a block of steps before each block of the fit, on the same batches, and times both.

    A block of the fit is timed from before its first step to before the step after its last, so that all that
    Lightning and the loader do between steps counts. The first block of each is a warm-up.
    """

    bare: BareLoop
    batches: Sequence[dict[str, Tensor]]  # of all blocks, and one more
    steps: int
    ours_seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    _start: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index % self.steps:
            return
        now = time.perf_counter()
        if self._start is not None:
            self.ours_seconds.append((now - self._start) / self.steps)
        if index < len(self.batches) - 1:  # the one batch that is left over ends the last block
            self._run_bare(self.batches[index : index + self.steps])
        self._start = time.perf_counter()

    def _run_bare(self, batches: Sequence[dict[str, Tensor]]) -> None:
        start = time.perf_counter()
        for batch in batches:
            self.bare.step(batch)
        self.bare_seconds.append((time.perf_counter() - start) / self.steps)


def bench_step(
    recipe: Recipe, config: dict[str, Any], *, steps: int, blocks: int
) -> tuple[dict[str, Any], Learner, Turns]:
    """Median milliseconds per step of the fit and of the bare loop, over `blocks` blocks of `steps` steps, and the
    median of the ratios of each block of the fit to the bare block before it, which had the same batches: what else
    runs on the machine slows both of a pair.

    Also returns what ran: the same steps on both sides, and one more of the fit, on the last of the batches.

    Raises:
        ConfigError: a precision that the bare loop does not have.
    """
    if recipe.trainer.lightning_precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={recipe.trainer.precision!r}: needs auto, fp32 or bf16")
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    count = steps * (blocks + 1) + 1
    batches = list(Repeated(corpus.training(), count))
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    bare = BareLoop(recipe, deepcopy(model), count)
    work = assemble(recipe, corpus, model)
    work.context = replace(work.context, steps=count)
    learner = Learner(
        model.train(), task=recipe.task, labels=corpus.labels, optimizer=recipe.optimizer,
        schedule=recipe.schedule, steps=count, terms=work.terms, task_weight=recipe.task_weight,
    )  # fmt: skip
    turns = Turns(bare, batches, steps)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        logger = recipe.logger.build(folder, config)
        callbacks = callbacks_of(recipe, work, folder / "checkpoints", bool(logger))
        trainer = recipe.trainer.build(folder, logger, [turns, *callbacks])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
            trainer.fit(learner, Repeated(corpus.training(), count))
    pairs = list(zip(turns.ours_seconds[1:], turns.bare_seconds[1:], strict=True))
    result = {
        "ours_ms": 1000 * statistics.median(turns.ours_seconds[1:]),
        "bare_ms": 1000 * statistics.median(turns.bare_seconds[1:]),
        "ratio": statistics.median(ours / by_hand for ours, by_hand in pairs),
        "blocks": [[1000 * ours, 1000 * by_hand] for ours, by_hand in pairs],
        "steps": steps,
        "loader": {"ours": "in the time", "bare": "batches ready made"},
        "rows": recipe.data.batch_size,
        "tokens": max(batch["input_ids"].shape[1] for batch in batches),
        "precision": recipe.trainer.lightning_precision,
    }
    return result, learner, turns


def bench_epoch(recipe: Recipe, config: dict[str, Any], *, rounds: int) -> dict[str, Any]:
    """Median seconds of one epoch on the same encoded rows, over `rounds` rounds in which the sides take turns to be
    first: our fit with its defaults (validation and checkpoints included) and Hugging Face's Trainer with its own at
    the same batch size."""
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    ours: list[float] = []
    theirs: list[tuple[float, str]] = []
    for turn in range(2 * rounds):
        with tempfile.TemporaryDirectory() as place:
            if turn % 4 in (1, 2):  # ours, theirs; theirs, ours; ...
                theirs.append(hugging_face_epoch(recipe, corpus, Path(place)))
            else:
                ours.append(our_epoch(recipe, corpus, Path(place), config))
    seconds, their_seconds = statistics.median(ours), statistics.median(one for one, _ in theirs)
    return {
        "ours_seconds": seconds,
        "hugging_face_seconds": their_seconds,
        "ratio": seconds / their_seconds,
        "rounds": [[a, b] for a, (b, _) in zip(ours, theirs, strict=True)],
        "rows": len(corpus.features["train"]),
        "batch_size": recipe.data.batch_size,
        "precision": recipe.trainer.lightning_precision,
        "hugging_face_precision": theirs[0][1],
    }


def our_epoch(recipe: Recipe, corpus: Corpus, folder: Path, config: dict[str, Any]) -> float:
    """Seconds of `niwaki.fit.fit` for one epoch."""
    work = assemble(recipe, corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed))
    start = time.perf_counter()
    fit(recipe, corpus, work, folder, config, resume=False)
    return time.perf_counter() - start


def hugging_face_epoch(recipe: Recipe, corpus: Corpus, folder: Path) -> tuple[float, str]:
    """Seconds of `Trainer.train` for one epoch, and the precision that it computes in."""
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=recipe.data.batch_size, num_train_epochs=1,
        seed=recipe.seed, use_cpu=True, report_to="none",
    )  # fmt: skip
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    rows = corpus.features["train"].remove_columns("length")
    trainer = Trainer(model, settings, train_dataset=rows, processing_class=corpus.tokenizer)
    start = time.perf_counter()
    trainer.train()
    precision = "bf16-mixed" if settings.bf16 else "16-mixed" if settings.fp16 else "32-true"
    return time.perf_counter() - start, precision


def composed(*overrides: str) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and config of the defaults with these changes."""
    config = compose.compose(["trainer=cpu", "logger=csv", "trainer.max_epochs=1", *overrides]).config
    recipe = compose.build(config)
    recipe.trainer.prepare()
    pl.seed_everything(recipe.seed, verbose=False)
    return recipe, config


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of a block.")] = 1,
    blocks: Annotated[int, typer.Option(min=1, help="Timed blocks of each loop.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    trainer: Annotated[Path | None, typer.Option(help="Labelled rows: also time an epoch on them.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to validate on; else carved from those.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows to test on; else carved from those.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Epochs of each side.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Time our step against a bare loop's, and an epoch against Hugging Face's Trainer."""
    if trainer is None and (validation or test):
        raise ConfigError(f"--{'validation' if validation else 'test'}: belongs to an epoch; give --trainer")
    quiet_loggers()
    common = (f"data.batch_size={batch_size}", f"trainer.precision={quoted(precision)}")
    results: dict[str, Any] = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    results["step"], _, _ = bench_step(*composed(*common), steps=steps, blocks=blocks)
    say(
        "step, loader included: {ours_ms:.1f} ms in {precision}, bare loop on the same batches ready made: "
        "{bare_ms:.1f} ms in {precision}, median ratio of the pairs {ratio:.4f}",
        results["step"],
    )
    if results["step"]["bare_ms"] < 1000 * LONG_ENOUGH:
        print(
            f"a step takes less than {1000 * LONG_ENOUGH:.0f} ms here: give a larger --batch-size",
            file=sys.stderr,
        )
    if trainer is not None:
        files = {"train": trainer, "validation": validation, "test": test}
        given = [f"data.{split}={quoted(file)}" for split, file in files.items() if file is not None]
        results["epoch"] = bench_epoch(*composed("data=files", *given), rounds=rounds)
        say(
            "epoch of {rows} rows, validation and checkpoints included: {ours_seconds:.1f} s in {precision}, "
            "Hugging Face's Trainer {hugging_face_seconds:.1f} s in {hugging_face_precision}, ratio {ratio:.3f}",
            results["epoch"],
        )
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def say(text: str, values: dict[str, Any]) -> None:
    """Print a line of results."""
    print(text.format(**values), flush=True)


if __name__ == "__main__":
    try:
        command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        command.command()(main)
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
