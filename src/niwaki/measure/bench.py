"""How much time a step costs above a bare PyTorch loop, and an epoch against Hugging Face's Trainer.

    python -m niwaki.measure.bench [--trainer FILE] [--output FILE]

Step time: the fit of `train.py` (Lightning, the csv logger, progress, checkpoint and learning-rate callbacks)
and a bare loop take turns in one process, block by block, each with its own copy of the same model, on the
same batches.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from niwaki.quiet import quiet_libraries

quiet_libraries()

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from niwaki import compose  # noqa: E402
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


@dataclass
class Turns(pl.Callback):
    """Lets a bare loop run a block of steps before each block of the fit, and times both.

    A block of the fit is timed from before its first step to before the step after its last, so that all that
    Lightning does between steps counts. The first block of each is a warm-up.
    """

    bare: BareLoop
    batches: Sequence[dict[str, Tensor]]
    ours_seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    _start: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index % len(self.batches):
            return
        now = time.perf_counter()
        if self._start is not None:
            self.ours_seconds.append((now - self._start) / len(self.batches))
        if index < trainer.num_training_batches - 1:  # the one batch that is left over ends the last block
            self._run_bare()
        self._start = time.perf_counter()

    def _run_bare(self) -> None:
        start = time.perf_counter()
        for batch in self.batches:
            self.bare.step(batch)
        self.bare_seconds.append((time.perf_counter() - start) / len(self.batches))


def bench_step(
    recipe: Recipe, config: dict[str, Any], *, steps: int, blocks: int
) -> tuple[dict[str, Any], Learner, Turns]:
    """Median milliseconds per step of the fit and of the bare loop, over `blocks` blocks of `steps` steps.

    Also returns what ran: the same steps on both sides, and one more of the fit, on the first batch.

    Raises:
        ConfigError: a precision that the bare loop does not have.
    """
    if recipe.trainer.lightning_precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={recipe.trainer.precision!r}: needs auto, fp32 or bf16")
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    batches = corpus.samples("train", recipe.data.batch_size, steps)
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    whole = list(batches) * (blocks + 1) + [batches[0]]
    bare = BareLoop(recipe, deepcopy(model), len(whole))
    work = assemble(recipe, corpus, model)
    learner = Learner(
        model.train(), task=recipe.task, labels=corpus.labels, optimizer=recipe.optimizer,
        schedule=recipe.schedule, steps=len(whole), terms=work.terms, task_weight=recipe.task_weight,
    )  # fmt: skip
    turns = Turns(bare, batches)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        logger = recipe.logger.build(folder, config)
        callbacks = callbacks_of(recipe, work, folder / "checkpoints", bool(logger))
        trainer = recipe.trainer.build(folder, logger, [turns, *callbacks])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
            trainer.fit(learner, DataLoader(whole, batch_size=None))  # type: ignore[arg-type]
    ours, by_hand = statistics.median(turns.ours_seconds[1:]), statistics.median(turns.bare_seconds[1:])
    result = {
        "ours_ms": 1000 * ours,
        "bare_ms": 1000 * by_hand,
        "ratio": ours / by_hand,
        "blocks": [[1000 * a, 1000 * b] for a, b in zip(turns.ours_seconds[1:], turns.bare_seconds[1:], strict=True)],
        "steps": len(batches),
        "rows": recipe.data.batch_size,
        "tokens": max(batch["input_ids"].shape[1] for batch in batches),
        "precision": recipe.trainer.lightning_precision,
    }
    return result, learner, turns


def bench_epoch(recipe: Recipe, config: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one epoch on the same encoded rows: our fit with its defaults (validation and checkpoints
    included) and Hugging Face's Trainer with its own at the same batch size."""
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    with tempfile.TemporaryDirectory() as place:
        theirs = hugging_face_seconds(recipe, corpus, Path(place))
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    work = assemble(recipe, corpus, model)
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        fit(recipe, corpus, work, Path(place), config, resume=False)
        ours = time.perf_counter() - start
    return {
        "ours_seconds": ours,
        "hugging_face_seconds": theirs,
        "ratio": ours / theirs,
        "rows": len(corpus.features["train"]),
        "batch_size": recipe.data.batch_size,
        "precision": recipe.trainer.lightning_precision,
    }


def hugging_face_seconds(recipe: Recipe, corpus: Corpus, folder: Path) -> float:
    """Seconds of `Trainer.train` for one epoch."""
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
    return time.perf_counter() - start


def composed(*overrides: str) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and config of the defaults with these changes."""
    config = compose.compose(["trainer=cpu", "logger=csv", "trainer.max_epochs=1", *overrides]).config
    recipe = compose.build(config)
    recipe.trainer.prepare()
    pl.seed_everything(recipe.seed, verbose=False)
    return recipe, config


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of a block.")] = 10,
    blocks: Annotated[int, typer.Option(min=1, help="Timed blocks of each loop.")] = 7,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    trainer: Annotated[Path | None, typer.Option(help="Labelled rows: also time an epoch on them.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Time our step against a bare loop's, and an epoch against Hugging Face's Trainer."""
    quiet_libraries()  # again: Lightning turns its notices on when it is imported
    common = (f"data.batch_size={batch_size}", f"trainer.precision={quoted(precision)}")
    results: dict[str, Any] = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    results["step"], _, _ = bench_step(*composed(*common), steps=steps, blocks=blocks)
    say("step: {ours_ms:.1f} ms, bare loop {bare_ms:.1f} ms, ratio {ratio:.4f}", results["step"])
    if results["step"]["bare_ms"] < 1000 * LONG_ENOUGH:
        print(
            f"a step takes less than {1000 * LONG_ENOUGH:.0f} ms here: give a larger --batch-size",
            file=sys.stderr,
        )
    if trainer is not None:
        results["epoch"] = bench_epoch(*composed("data=files", f"data.train={quoted(trainer)}"))
        say(
            "epoch: {ours_seconds:.1f} s in {precision}, "
            "Hugging Face's Trainer {hugging_face_seconds:.1f} s, ratio {ratio:.3f}",
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
