"""Fits with state of their own (moments, averages, thawing): stopped at any moment and gone on with, they end bit for
bit where they would have."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from niwaki import compose
from niwaki.callbacks import StoppedError
from niwaki.data.corpus import Corpus
from niwaki.fit import Work, fit
from niwaki.pipeline import assemble

WORDS = ("pine", "oak", "maple", "koi", "carp", "pond")
SETTINGS = (
    "model=tiny-bert", "trainer=cpu", "logger=none", "trainer.precision=fp32", "data=files", "data.batch_size=4",
    "data.eval_batch_size=2", "callbacks=[checkpoint]", "trainer.max_epochs=2",
)  # fmt: skip
PRUNED = (
    "compression=[prune/magnitude]",
    "compression.magnitude.schedule=cubic",
    "compression.magnitude.end=0.4",
    "compression.magnitude.interval=1",
)
FITS = {
    "adafactor": ("optimizer=adafactor", "optimizer.lr=0.01"),
    "lion": ("optimizer=lion", "optimizer.lr=0.001", "optimizer.layer_decay=0.8"),
    "schedule_free": ("optimizer=schedule_free", "schedule=constant", "optimizer.lr=0.01"),
    "schedule_free+lora": ("optimizer=schedule_free", "schedule=constant", "optimizer.lr=0.01", "tuning=lora"),
    "rates": ("optimizer.lr=0.01", "optimizer.layer_decay=0.5", "optimizer.lr_by_part={head: 0.02, norms: 0.005}"),
    "ema": ("optimizer.lr=0.01", "callbacks=[checkpoint,ema]", "callbacks.ema.begin=0.2"),
    "ema+pruned": ("optimizer.lr=0.01", "callbacks=[ema,checkpoint]", *PRUNED),
    "codebook+ema": (
        "optimizer.lr=0.01", "callbacks=[checkpoint,ema]", "callbacks.ema.begin=0.2",
        "compression=[share/codebook]", "compression.codebook.begin=0.3",
    ),
    "codebook+lora": (
        "optimizer.lr=0.01", "tuning=lora", "compression=[prune/magnitude,share/codebook]",
        "compression.codebook.begin=0.6", "compression.codebook.reassign=2",
    ),
    "swa": ("optimizer.lr=0.01", "callbacks=[checkpoint,swa]", "callbacks.swa.begin=0.3", "callbacks.swa.every=2"),
    "gradual": ("optimizer.lr=0.01", "tuning=gradual", "tuning.every=0.2"),
    "gradual+ema": (
        "optimizer.lr=0.01", "tuning=gradual", "tuning.every=0.2", "callbacks=[checkpoint,ema]",
        "trainer.accumulate=2", "optimizer.weight_decay=0.5",
    ),
    "gradual+schedule_free": (
        "optimizer=schedule_free", "schedule=constant", "optimizer.lr=0.01", "tuning=gradual", "tuning.every=0.2",
    ),
}  # fmt: skip
FITS |= {"masked_lm": ("task=masked_lm", "task.max_length=16", "optimizer.lr=0.01")}
FITS |= {  # with masks that have a state of their own, stopped between two of them
    "rigl": (
        "optimizer.lr=0.01", "compression=[prune/random]", "compression.random.schedule=rigl",
        "compression.random.interval=4", "compression.random.fraction=0.5",
    ),
    "rewind": (
        "optimizer.lr=0.01", "schedule=constant", "compression=[prune/magnitude]",
        "compression.magnitude.schedule=rewind", "compression.magnitude.begin=0.1",
    ),
    "taylor": (
        "optimizer.lr=0.01", "compression=[prune/taylor]", "compression.taylor.schedule=cubic",
        "compression.taylor.end=0.9", "compression.taylor.interval=4",
    ),
    "taylor+rewind+lora": (
        "optimizer.lr=0.01", "tuning=lora", "compression=[prune/taylor]", "compression.taylor.schedule=rewind",
        "compression.taylor.rounds=2", "trainer.accumulate=2",
    ),
    "movement": ("optimizer.lr=0.001", "compression=[prune/movement]", "compression.movement.interval=2"),
    "movement+zero": (
        "optimizer.lr=0.001", "compression=[prune/movement]", "compression.movement.start=zero",
        "compression.movement.interval=2",
    ),
    "soft_movement": (
        "optimizer.lr=0.001", "compression=[prune/soft_movement]", "compression.soft_movement.penalty=1.0",
        "compression.soft_movement.interval=2",
    ),
    "sparsegpt": ("optimizer.lr=0.01", "compression=[prune/sparsegpt]", "compression.sparsegpt.rows=8"),
}  # fmt: skip
MOMENTS = [("on_train_batch_start", 3), ("on_validation_batch_start", 7), ("on_validation_end", 7)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    made = [{"text": f"{WORDS[i % 6]} {i} " * (1 + i % 5), "label": "tree" if i % 6 < 3 else "fish"} for i in range(35)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


class Signal(pl.Callback):
    """A signal in `hook` at the first moment at or after optimizer step `step`."""

    def __init__(self, hook: str, step: int) -> None:
        self.sent = False
        setattr(self, hook, lambda trainer, *_: self._pass(trainer, step))

    def _pass(self, trainer: pl.Trainer, step: int) -> None:
        if not self.sent and trainer.global_step >= step:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    rows: Path, folder: Path, overrides: Sequence[str] = (), callbacks: Sequence[pl.Callback] = (), resume: bool = False
) -> tuple[Any, Corpus, Work]:
    config = compose.compose([*SETTINGS, f"data.train='{rows}'", *overrides]).config
    recipe = compose.build(config)
    pl.seed_everything(recipe.seed, verbose=False)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    work = assemble(recipe, corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed))
    work.callbacks += callbacks
    fit(recipe, corpus, work, folder, config, resume=resume)
    return recipe, corpus, work


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(left: Any, right: Any) -> bool:
    """Whether two trees of a checkpoint are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@pytest.mark.parametrize(("hook", "step"), MOMENTS)
@pytest.mark.parametrize("name", FITS)
def test_a_stopped_fit_goes_on_to_the_same_end(rows: Path, tmp_path: Path, name: str, hook: str, step: int) -> None:
    _, _, whole = run(rows, tmp_path / "whole", FITS[name])
    sent = Signal(hook, step // 2 if "accumulate" in str(FITS[name]) else step)
    with pytest.raises(StoppedError, match="SIGTERM at optimizer step"):
        run(rows, tmp_path / "parts", FITS[name], [sent])
    torch.manual_seed(12345)  # a resumed run brings its own randomness
    _, _, parts = run(rows, tmp_path / "parts", FITS[name], resume=True)
    left, right = (checkpoint(tmp_path / place, "last") for place in ("whole", "parts"))
    assert left["global_step"] == right["global_step"] > step // 2
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(left[key], right[key]), key
    averages = [next((v for k, v in one["callbacks"].items() if "Average" in k), None) for one in (left, right)]
    assert same(*averages)
    assert same(*(checkpoint(tmp_path / place, "best")["state_dict"] for place in ("whole", "parts")))
    assert same(whole.model.state_dict(), parts.model.state_dict())


def test_every_rate_is_logged_under_a_name_of_its_own(rows: Path, tmp_path: Path) -> None:
    logged = ("logger=csv", "callbacks=[learning_rate]", "trainer.log_every=1", "trainer.max_steps=3")
    run(rows, tmp_path / "run", (*logged, "optimizer.lr=0.8", "optimizer.layer_decay=0.5", "schedule=constant"))
    text = (tmp_path / "run" / "csv" / "metrics.csv").read_text().splitlines()
    names = text[0].split(",")
    rows_of_rates = [dict(zip(names, line.split(","), strict=True)) for line in text[1:]]
    rates = [{float(v) for n, v in row.items() if n.startswith("lr-") and v} for row in rows_of_rates]
    found = next(one for one in reversed(rates) if one)
    assert sorted(found) == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert sum(name.startswith("lr-") for name in names) == 8  # with and without decay
