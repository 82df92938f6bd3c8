"""Averages of the weights: their arithmetic by hand, and that they are what is validated, kept and saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from niwaki import artifact, compose
from niwaki.average import Average
from niwaki.callbacks import EMA, SWA, Checkpoint, LastCheckpoint, Watch
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.fit import fit
from niwaki.pipeline import assemble, fold_and_convert, settle
from niwaki.recipe import Recipe


class Counting(pl.LightningModule):
    """The one weight is the number of the step; validation says which weight it was shown."""

    average: Average | None = None

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        self.model.weight.data.zero_()
        self.shown: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return -self.model.weight.sum()

    def validation_step(self, batch: Any, index: int) -> None:
        self.shown.append(self.model.weight.item())
        self.log("validation/score", self.model.weight.detach().sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.average is not None
        self.average.write(checkpoint, self)


def count(settings: EMA | SWA, folder: Path, epochs: int = 2, **more: Any) -> Counting:
    """Epochs of two steps, with a validation after each."""
    module = Counting()
    watch = Watch(folder, "validation/score", "max", 0, logged=False, steps=2 * epochs, epoch=2)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=epochs,
        num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[*Checkpoint().build(watch), *settings.build(watch)], **more,
    )  # fmt: skip
    trainer.fit(module, DataLoader([0, 1]), DataLoader([0]))  # type: ignore[arg-type]
    return module


def stored(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["state_dict"]["model.weight"])


def test_the_exponential_average_by_hand(tmp_path: Path) -> None:
    module = count(EMA(decay=0.5, warm_up=False), tmp_path)
    # a: 0; 0.5 * 0 + 0.5 * 1; 0.5 * 0.5 + 0.5 * 2; 0.625 + 1.5; 1.0625 + 2
    assert module.shown == [1.25, 3.0625]
    assert module.model.weight.item() == 3.0625
    assert stored(tmp_path / "best.ckpt") == 3.0625
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert float(last["state_dict"]["model.weight"]) == 4.0  # the fit goes on from there
    (state,) = [value for key, value in last["callbacks"].items() if "Average" in key]
    assert (state["count"], state["step"], float(state["weights"]["weight"])) == (5, 4, 3.0625)


def test_the_first_weights_weigh_less_with_a_warm_up(tmp_path: Path) -> None:
    # shares of the new weights: 1 - 2/11, 1 - 3/12, then 1 - 0.3 as the decay is at most 0.3: 4/13 > 0.3
    first = 9 / 11
    second = first + 0.75 * (2 - first)
    third = second + 0.7 * (3 - second)
    module = count(EMA(decay=0.3), tmp_path)
    assert module.shown == [pytest.approx(second), pytest.approx(third + 0.7 * (4 - third))]


def test_every_so_many_steps_from_where_it_begins(tmp_path: Path) -> None:
    # begins at step 2 of 8 as 2, takes in 5 and 8; before it begins the latest weight is shown
    module = count(EMA(decay=0.5, warm_up=False, begin=0.25, every=3), tmp_path, epochs=4)
    assert module.shown == [2.0, 2.0, 3.5, 5.75]


def test_the_equal_average_by_hand(tmp_path: Path) -> None:
    module = count(SWA(begin=0.5, every=1), tmp_path)
    assert module.shown == [2.0, 3.0]  # the mean of 2, 3 and 4
    assert stored(tmp_path / "best.ckpt") == 3.0
    assert stored(tmp_path / "last.ckpt") == 4.0


def test_the_equal_average_takes_one_an_epoch(tmp_path: Path) -> None:
    module = count(SWA(begin=0.25), tmp_path, epochs=4)
    assert module.shown == [2.0, 3.0, 4.0, 5.0]  # of 2; 2, 4; 2, 4, 6; 2, 4, 6, 8
    assert module.model.weight.item() == 5.0


def test_accumulated_batches_enter_once(tmp_path: Path) -> None:
    module = count(EMA(decay=0.5, warm_up=False), tmp_path, epochs=2, accumulate_grad_batches=2)
    assert module.shown == [0.5, 1.25]


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: EMA(decay=1.0), "ema.decay"), (lambda: EMA(decay=0.0), "ema.decay"),
        (lambda: EMA(begin=1.0), "ema.begin"), (lambda: EMA(every=0), "ema.every"),
        (lambda: SWA(begin=-0.1), "swa.begin"), (lambda: SWA(every=0), "swa.every"),
    ],
)  # fmt: skip
def test_refusals(build: Callable[[], Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^callbacks\.{name}="):
        build()


def test_what_keeps_an_average_cannot_be_had_twice_or_without_a_fit() -> None:
    def composed(*overrides: str) -> Recipe:
        return compose.build(compose.compose(["model=tiny-bert", *overrides]).config)

    with pytest.raises(ConfigError, match=r"^callbacks=ema and callbacks=swa: each keeps its own average"):
        composed("callbacks=[ema,swa]")
    with pytest.raises(ConfigError, match=r"^optimizer=schedule_free and callbacks=ema or swa: each keeps"):
        composed("callbacks=[ema]", "optimizer=schedule_free", "schedule=constant")
    with pytest.raises(ConfigError, match=r"^callbacks=swa and trainer\.max_epochs=0: there is no fit"):
        composed("callbacks=[swa]", "trainer.max_epochs=0")


WORDS = ("pine", "oak", "maple", "koi", "carp", "pond")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    made = [{"text": f"{WORDS[i % 6]} {i} " * (1 + i % 5), "label": "tree" if i % 6 < 3 else "fish"} for i in range(35)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


class Recorder(pl.Callback):
    """Base weights and optimizer after every step, as the fit had them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps: list[dict[str, torch.Tensor]] = [self.weights()]
        self.optimizer: dict[str, Any] = {}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(self.weights())

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.last = self.weights()
        self.optimizer = trainer.optimizers[0].state_dict()


def run(rows: Path, folder: Path, overrides: Sequence[str]) -> tuple[Recorder, dict[str, torch.Tensor], Any]:
    """A whole run; what it recorded, the tensors of its artifact, and what it ran on."""
    settings = ("model=tiny-bert", "logger=none", "trainer.precision=fp32", "data=files", "trainer.max_epochs=2")
    more = ("data.batch_size=4", "optimizer.lr=0.01", f"data.train='{rows}'", "model.dropout=0.0")
    config = compose.compose([*settings, *more, *overrides]).config
    recipe = compose.build(config)
    pl.seed_everything(0, verbose=False)
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    work = assemble(recipe, corpus, recipe.model.load(recipe.task, corpus.labels, recipe.seed))
    recorder = Recorder(work.model)
    work.callbacks.append(recorder)
    fit(recipe, corpus, work, folder, config, resume=False)
    settle(recipe, work)
    fold_and_convert(recipe, work)
    artifact.save(
        folder / "model", model=work.model, tokenizer=corpus.tokenizer, task=recipe.task, labels=corpus.labels,
        base_config=work.base_config, edits=work.edits,
    )  # fmt: skip
    return recorder, load_file(folder / "model" / "model.safetensors"), work


def averaged(steps: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    mean = {name: weight.double() for name, weight in steps[0].items()}
    for weights in steps[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * weights[name].double() for name in mean}
    return mean


def test_an_average_of_one_is_none() -> None:
    watch = Watch(Path("checkpoints"), "validation/accuracy", "max", 0, logged=False, steps=24, epoch=8)
    with pytest.raises(ConfigError, match=r"^callbacks\.swa\.every=None: makes an average of 1 of the fit's 24 steps"):
        SWA().build(watch)
    assert SWA(every=3).build(watch)
    with pytest.raises(ConfigError, match=r"^callbacks\.ema\.every=1000: "):
        EMA(every=1000).build(watch)


def test_ranks_that_were_dropped_stay_dropped() -> None:
    for changes in (["callbacks=[checkpoint,ema]"], ["optimizer=schedule_free", "schedule=constant"]):
        with pytest.raises(ConfigError, match=r"^(callbacks=ema|optimizer=schedule_free) and tuning=adalora: "):
            compose.build(compose.compose(["tuning=adalora", *changes]).config)


def test_under_a_mask_that_grows_the_artifact_holds_the_average_of_the_base_under_the_last_mask(
    rows: Path, tmp_path: Path
) -> None:
    pruned = ("schedule=cubic", "end=0.9", "interval=1", "sparsity=0.7")
    recorder, saved, work = run(
        rows, tmp_path / "run",
        ["compression=[prune/magnitude]", *(f"compression.magnitude.{p}" for p in pruned), "callbacks=[ema]",
         "callbacks.ema.decay=0.8", "callbacks.ema.warm_up=false"],
    )  # fmt: skip
    mean = averaged(recorder.steps, 0.8)
    assert len(recorder.steps) == 15
    for name in work.context.targets:
        mask = work.context.records[name]["mask"]
        weight = saved[f"{name}.weight"]
        assert int((weight == 0).sum()) == round(0.7 * weight.numel()) == int((~mask).sum())
        expected = mean[f"{name}.parametrizations.weight.original"] * mask
        assert torch.allclose(weight.double(), expected, atol=1e-6)
        assert not torch.allclose(weight, recorder.last[f"{name}.parametrizations.weight.original"] * mask, atol=1e-4)
    assert torch.allclose(saved["classifier.weight"].double(), mean["classifier.weight"], atol=1e-6)


def test_on_a_grid_it_is_the_average_that_is_rounded(rows: Path, tmp_path: Path) -> None:
    from niwaki.compression.quantize.integers import IntegerLinear

    recorder, _, work = run(
        rows, tmp_path / "run",
        ["compression=[quantize/qat]", "tuning=lora", "callbacks=[ema]", "callbacks.ema.decay=0.8",
         "callbacks.ema.warm_up=false", "compression.qat.bits=8"],
    )  # fmt: skip
    mean, saved = averaged(recorder.steps, 0.8), artifact.load(tmp_path / "run" / "model")
    for name in work.context.targets:
        layer: Any = saved.model.get_submodule(name)
        assert isinstance(layer, IntegerLinear)
        a, b = (mean[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
        weight = mean[f"{name}.base_layer.parametrizations.weight.original"] + 2.0 * b @ a
        scale = weight.abs().amax(1, keepdim=True) / 127
        assert float(((layer.dequantized() - weight) / scale).abs().max()) <= 0.51


def test_the_best_checkpoint_is_an_average(rows: Path, tmp_path: Path) -> None:
    recorder, saved, _ = run(
        rows, tmp_path / "run",
        ["callbacks=[checkpoint,ema]", "callbacks.ema.decay=0.8", "callbacks.ema.warm_up=false"],
    )  # fmt: skip
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    mean = averaged(recorder.steps[: best["global_step"] + 1], 0.8)
    assert all(torch.allclose(saved[n].double(), mean[n], atol=1e-6) for n in mean if n in saved)
    assert all(torch.equal(best["state_dict"][f"model.{n}"], tensor) for n, tensor in saved.items())


def test_best_does_not_count_before_the_average_has_begun(rows: Path, tmp_path: Path) -> None:
    run(
        rows,
        tmp_path / "run",
        ["callbacks=[checkpoint,swa]", "schedule=swa", "callbacks.swa.begin=0.6", "callbacks.swa.every=3"],
    )
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 14  # not that of the epoch before


def test_a_tied_weight_is_averaged_under_both_of_its_names(rows: Path, tmp_path: Path) -> None:
    recorder, saved, _ = run(
        rows, tmp_path / "run",
        ["task=causal_lm", "model=tiny-llama", "callbacks=[checkpoint,ema]", "callbacks.ema.decay=0.8",
         "callbacks.ema.warm_up=false", "trainer.max_steps=4"],
    )  # fmt: skip
    mean = averaged(recorder.steps, 0.8)["model.embed_tokens.weight"]
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name in ("model.model.embed_tokens.weight", "model.lm_head.weight"):
        assert torch.allclose(best[name].double(), mean, atol=1e-6)
    (name,) = {"model.embed_tokens.weight", "lm_head.weight"} & saved.keys()
    assert torch.allclose(saved[name].double(), mean, atol=1e-6)


@pytest.mark.parametrize("callbacks", ["[]", "[checkpoint]"])
def test_what_a_schedule_free_run_saves_is_the_average_of_its_library(
    rows: Path, tmp_path: Path, callbacks: str
) -> None:
    from schedulefree import AdamWScheduleFree

    recorder, saved, _ = run(
        rows, tmp_path / "run",
        ["optimizer=schedule_free", "schedule=constant", f"callbacks={callbacks}", "trainer.max_epochs=1",
         "optimizer.weight_decay=0.1"],
    )  # fmt: skip
    points = {name: nn.Parameter(weight) for name, weight in recorder.last.items()}
    ordered = [n for decays in (True, False) for n, p in points.items() if (p.ndim > 1) is decays]
    groups = [{"params": [points[n] for n in ordered if (points[n].ndim > 1) is decays]} for decays in (True, False)]
    reference = AdamWScheduleFree(groups)
    reference.load_state_dict(recorder.optimizer)
    reference.eval()
    assert all(torch.equal(saved[name], points[name]) for name in saved if name in points)
    assert not torch.allclose(saved["classifier.weight"], recorder.steps[-1]["classifier.weight"], atol=1e-4)


def test_a_checkpoint_between_validations_holds_what_trains(tmp_path: Path) -> None:
    module = Counting()
    watch = Watch(tmp_path, "validation/score", "max", 0, logged=False, steps=4, epoch=4)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        default_root_dir=tmp_path, limit_train_batches=3,
        callbacks=[LastCheckpoint(tmp_path / "last.ckpt", 2), *EMA(decay=0.5, warm_up=False).build(watch)],
    )  # fmt: skip
    trainer.fit(module, DataLoader([0, 1, 2, 3]))  # type: ignore[arg-type]
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert float(last["state_dict"]["model.weight"]) == 2.0
    (state,) = [value for key, value in last["callbacks"].items() if "Average" in key]
    assert float(state["weights"]["weight"]) == 1.25  # of step 2, not of the step before
