"""What a teacher costs from the second epoch on: with its answers kept on disk, asked each time, and without one.

.venv/bin/python experiments/distillation/cache.py TEACHER FOLDER

TEACHER is an artifact of six blocks, FOLDER holds its train, validation and test.jsonl. Three of its blocks are tuned
for two epochs in each of the three ways, in turns. Printed: the median step of the second epochs, and how far apart the
weights end that the two ways of asking lead to. Let nothing else run beside it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from niwaki import compose, pipeline
from niwaki.fit import fit

ROUNDS = 3


class Stopwatch(pl.Callback):
    """Seconds of each training step of the second epoch, the loading of its batch left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            self.seconds.append(time.perf_counter() - self._start)


def tuned(overrides: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The seconds of the steps of a fit's second epoch, and where its weights end."""
    composed = compose.compose(overrides)
    recipe = compose.build(composed.config)
    corpus, empty = pipeline.judge(recipe)
    pipeline.check_teachers(recipe, corpus, empty)
    work = pipeline.assemble(recipe, corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed))
    watch = Stopwatch()
    work.callbacks.append(watch)
    with tempfile.TemporaryDirectory() as folder:
        fit(recipe, corpus, work, Path(folder), composed.config, resume=False)
    return watch.seconds, {name: value.detach().clone() for name, value in work.model.state_dict().items()}


def main(teacher: str, data: str) -> None:
    """Time the three ways in turns."""
    common = [
        "model=pretrained", f"model.name={teacher}", "model.layers=[1,3,5]", "data=files",
        *(f"data.{split}={data}/{split}.jsonl" for split in ("train", "validation", "test")), "data.limit=960",
        "logger=none", "callbacks=[]", "trainer.max_epochs=2", "optimizer.lr=1e-4", "seed=0",
    ]  # fmt: skip
    asked = [*common, "compression=distill/logits", f"compression.logits.teacher={teacher}"]
    ways = {"alone": common, "asked each time": asked, "kept": [*asked, "compression.logits.cache=true"]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for _ in range(ROUNDS):
        for name, overrides in ways.items():
            steps, ends[name] = tuned(overrides)
            seconds[name] += steps
    medians = {name: statistics.median(steps) for name, steps in seconds.items()}
    for name, median in medians.items():
        print(f"{name:16} {1000 * median:7.1f} ms a step, {median / medians['alone']:.2f} of alone")
    one, other = ends["asked each time"], ends["kept"]
    print(f"weights of the two apart by at most {max(float((one[n] - other[n]).abs().max()) for n in one):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
