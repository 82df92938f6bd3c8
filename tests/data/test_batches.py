"""Batches: order, resume, ranks; and a real Trainer that stops in mid-epoch and goes on."""

import numpy as np
import pytest
import pytorch_lightning as lightning
import torch
from datasets import Dataset
from pytorch_lightning.callbacks import ModelCheckpoint

from niwaki.data.batches import Batches, BucketBatches, ByEpoch
from niwaki.errors import ConfigError, DataError

QUIET = (
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*have no `val_dataloader`.*",
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",
    "ignore:The dirpath has changed.*",
)


def rows(count: int) -> Dataset:
    lengths = np.random.default_rng(0).integers(1, 30, count).tolist()
    return Dataset.from_dict({"number": list(range(count)), "input_ids": [[1] * n for n in lengths]})


def numbers(batch: list[dict]) -> torch.Tensor:
    return torch.tensor([row["number"] for row in batch])


def served(loader: Batches) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_training_serves_each_row_once_in_another_order_each_epoch() -> None:
    loader = Batches(rows(103), numbers, 8, seed=1)
    first, second = served(loader), served(loader)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(103))
    assert first != second
    assert len(first) == len(second) == len(loader) == 13


def test_order_is_a_function_of_the_seed() -> None:
    data = rows(50)
    assert served(Batches(data, numbers, 4, seed=3)) == served(Batches(data, numbers, 4, seed=3))
    assert served(Batches(data, numbers, 4, seed=3)) != served(Batches(data, numbers, 4, seed=4))


def test_batches_hold_rows_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 4000)
    batches = BucketBatches(lengths, 16, seed=0).batches()
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    # Unsorted batches of 16 would spread over 17/18 of the range: some 176.
    assert spread < 10
    middles = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(middles, np.arange(len(middles)))[0, 1]) < 0.3


def test_evaluation_serves_the_longest_first_and_each_row_once() -> None:
    data = rows(45)
    order = flat(served(Batches(data, numbers, 8, seed=None)))
    lengths = [len(ids) for ids in data["input_ids"]]
    assert sorted(order) == list(range(45))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)


def test_a_length_column_is_preferred() -> None:
    data = Dataset.from_dict({"number": [0, 1, 2], "input_ids": [[1], [1, 1], [1] * 3], "length": [9, 5, 7]})
    assert flat(served(Batches(data, numbers, 1, seed=None))) == [0, 2, 1]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("count", "world"), [(101, 2), (64, 4), (9, 4)])
def test_ranks_share_the_rows_and_have_as_many_batches(seed: int | None, count: int, world: int) -> None:
    data = rows(count)
    parts = [served(Batches(data, numbers, 8, seed=seed, rank=rank, world=world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(flat([batch for part in parts for batch in part])) == list(range(count))
    assert all(1 <= len(batch) <= 8 for part in parts for batch in part)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_may_depend_on_the_epoch(workers: int) -> None:
    def told() -> ByEpoch:
        return ByEpoch(lambda batch, epoch: numbers(batch) + 100 * epoch)

    loader = Batches(rows(20), told(), 8, seed=1, workers=workers)
    for epoch in range(2):
        assert sorted(flat(served(loader))) == [100 * epoch + number for number in range(20)]
    resumed = Batches(rows(20), told(), 8, seed=1, workers=workers)
    resumed.load_state_dict({"epoch": 5, "position": 1})
    assert {number // 100 for number in flat(served(resumed))} == {5}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_serves_what_was_left(workers: int) -> None:
    data = rows(60)
    whole = Batches(data, numbers, 8, seed=2)
    epochs = [served(whole), served(whole)]
    stopped = Batches(data, numbers, 8, seed=2, workers=workers)
    iterator = iter(stopped)
    seen = [next(iterator).tolist() for _ in range(3)]
    assert stopped.state_dict() == {"epoch": 0, "position": 3}
    resumed = Batches(data, numbers, 8, seed=2, workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == {"epoch": 0, "position": 3}
    assert len(resumed) == 8
    assert seen + served(resumed) == epochs[0]
    assert served(resumed) == epochs[1]


def test_a_state_at_the_end_of_an_epoch_begins_the_next() -> None:
    data = rows(30)
    whole = Batches(data, numbers, 8, seed=2)
    served(whole)
    resumed = Batches(data, numbers, 8, seed=2)
    resumed.load_state_dict(whole.state_dict())
    assert served(resumed) == served(whole)


def test_an_iterator_that_is_not_read_changes_nothing() -> None:
    loader = Batches(rows(30), numbers, 8, seed=2)
    iter(loader)
    iter(loader)
    assert served(loader) == served(Batches(rows(30), numbers, 8, seed=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_the_global_generator_alone(workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    served(Batches(rows(20), numbers, 8, seed=2, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"position 9 .* 3 batches"):
        Batches(rows(24), numbers, 8, seed=0).load_state_dict({"epoch": 0, "position": 9})


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size=0"):
        BucketBatches(np.ones(3), 0, seed=0)
    with pytest.raises(ConfigError, match="rank=2"):
        BucketBatches(np.ones(3), 1, seed=0, rank=2, world=2)
    with pytest.raises(DataError, match="3 rows for 4 processes"):
        BucketBatches(np.ones(3), 1, seed=0, rank=0, world=4)


class Recorder(lightning.LightningModule):
    """Learns one number, and writes down which rows it saw in which step of which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, index, batch.tolist()))
        return (self.weight - batch.float().mean()) ** 2

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", (self.weight - batch.float().mean()) ** 2, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Kill(lightning.Callback):
    """Ends the process's training as a crash would, once that many batches are done."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.after:
            raise KeyError("killed")


def fit(folder: str, saver: dict, *, validate: bool, workers: int = 0, kill: int | None = None, **options) -> list:
    """The rows seen; goes on from the checkpoint that `resume` names."""
    resume = options.pop("resume", None)
    keep = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **saver)
    module = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[keep] + ([Kill(kill)] if kill is not None else []),
        **options,
    )
    train = Batches(rows(52), numbers, 8, seed=7, workers=workers)
    test = Batches(rows(20), numbers, 8, seed=None) if validate else None
    if kill is not None:
        with pytest.raises(KeyError, match="killed"):
            trainer.fit(module, train, test)
    else:
        trainer.fit(module, train, test, ckpt_path=resume, weights_only=True)
    return module.seen


SAVERS = {
    "every 5 steps": {"every_n_train_steps": 5},
    "every step": {"every_n_train_steps": 1},
    "after validation": {"monitor": None, "every_n_epochs": 1, "save_on_train_epoch_end": False},
    "at the end of an epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize(
    ("saver", "validation", "length"),
    [
        (saver, validation, length)
        for saver, validation in (
            ("every 5 steps", {}),
            ("every 5 steps", {"val_check_interval": 3}),
            ("every step", {}),
            ("after validation", {}),
            ("after validation", {"val_check_interval": 3}),
        )
        for length in ({"max_epochs": 3}, {"max_steps": 21})
    ]
    # With max_steps Lightning itself miscounts after this one, whatever the loader.
    + [("at the end of an epoch", {}, {"max_epochs": 3})],
)
def test_a_killed_training_goes_on_with_the_same_batches(tmp_path, saver: str, validation: dict, length: dict) -> None:
    options = {"validate": saver == "after validation" or bool(validation), **validation, **length}
    whole = fit(str(tmp_path / "whole"), SAVERS[saver], **options)
    assert [(epoch, index) for epoch, index, _ in whole] == [(e, i) for e in range(3) for i in range(7)]
    assert all(sorted(flat([b for e, _, b in whole if e == epoch])) == list(range(52)) for epoch in range(3))
    saved = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert saved
    for path in saved:
        done = int(path.stem.split("=")[1])
        if done < 21:
            rest = fit(str(tmp_path / f"rest{done}"), SAVERS[saver], resume=str(path), **options)
            assert rest == whole[done:], path.name


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}, {"accumulate_grad_batches": 2}])
def test_resume_with_workers_limits_and_accumulation(tmp_path, options: dict) -> None:
    saver = {"every_n_train_steps": 2}
    common = {"validate": False, "max_epochs": 2, "workers": 2, **options}
    whole = fit(str(tmp_path / "whole"), saver, **common)
    fit(str(tmp_path / "part"), saver, kill=6, **common)
    path = tmp_path / "part" / "step=2.ckpt"
    rest = fit(str(tmp_path / "rest"), saver, resume=str(path), **common)
    assert rest == whole[2 * options.get("accumulate_grad_batches", 1) :]
