"""The Learner: its loss, its refusal of what is not finite, a randomness that goes on where it stopped."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import pytorch_lightning as pl
import torch

from niwaki.module import DivergedError, Finite, Learner
from niwaki.optimizer import SGD, AdamW
from niwaki.schedule import Linear


def learner_of(one: Any, **changes: Any) -> Learner:
    settings: dict[str, Any] = {
        "task": one.task, "labels": one.labels, "optimizer": SGD(lr=0.05), "schedule": Linear(warmup=0.0),
        "steps": 4, "terms": {}, "task_weight": 1.0,
    }  # fmt: skip
    return Learner(one.model, **(settings | changes))


def test_the_loss_is_the_weighted_sum(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting()
    batch = one.batch()
    own = one.task.loss(one.model(**one.task.inputs(batch)), batch).item()
    terms = {
        "a": lambda outputs, batch: torch.tensor(0.5),
        "b": lambda outputs, batch: outputs.logits.sum() * 0 + 2.0,
    }
    learner = learner_of(one, terms=terms, task_weight=0.25)
    trainer = train(learner, [batch])
    logged = trainer.callback_metrics
    assert logged["train/loss"].item() == pytest.approx(0.25 * own + 2.5, rel=1e-5)
    assert logged["train/task"].item() == pytest.approx(own, rel=1e-5)
    assert (logged["train/a"].item(), logged["train/b"].item()) == (0.5, 2.0)


def test_label_smoothing_is_for_training_only(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    from niwaki.task.classification import Classification

    one = setting()
    one.task = Classification(label_smoothing=0.4)
    batch = one.batch()
    one.model.classifier.weight.data *= 50
    log = one.logits().log_softmax(-1)
    right = log[torch.arange(len(log)), batch["labels"]]
    trainer = train(learner_of(one, optimizer=SGD(lr=1e-12)), [batch], [batch])
    metrics = trainer.callback_metrics
    assert metrics["validation/loss"].item() == pytest.approx(-right.mean().item(), rel=1e-4)
    assert metrics["train/loss"].item() == pytest.approx(-(0.6 * right + 0.4 * log.mean(-1)).mean().item(), rel=1e-4)


def test_validation_scores_are_those_of_the_task(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    trainer = train(learner_of(one, optimizer=SGD(lr=1e-12)), [one.batch()], [one.batch()])
    scores = one.task.scores(one.labels)
    scores.update(type("", (), {"logits": one.logits()}), one.batch())
    for name, value in scores.compute().items():
        assert trainer.callback_metrics[f"validation/{name}"].item() == pytest.approx(value, rel=1e-5)


def test_validation_asks_for_the_score_to_watch_alone(
    setting: Callable[..., Any], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from niwaki.task.ner import NER

    one = setting("bert", "ner")
    calls: list[str] = []
    own = NER.watch
    monkeypatch.setattr(NER, "watch", lambda self, *rest: calls.append("watch") or own(self, *rest))
    train(learner_of(one, optimizer=SGD(lr=1e-12)), [one.batch()], [one.batch()])
    assert set(calls) == {"watch"}


def test_a_step_is_that_of_the_optimizer_and_the_schedule(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one, other = setting(), setting()
    batch = one.batch()
    train(learner_of(one, optimizer=SGD(lr=0.1, momentum=0.0)), [batch] * 2)
    for rate in (0.1, 0.1 * 0.75):  # Linear over 4 steps
        other.model.zero_grad()
        other.task.loss(other.model(**other.task.inputs(batch)), batch).backward()
        for parameter in other.model.parameters():
            if parameter.grad is not None:
                parameter.data -= rate * parameter.grad
    theirs = dict(other.model.named_parameters())
    assert all(torch.allclose(p, theirs[n], atol=1e-6) for n, p in one.model.named_parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_fit_and_names_the_step(
    setting: Callable[..., Any], train: Callable[..., Any], bad: float
) -> None:
    one = setting()
    steps: list[int] = []

    def term(outputs: Any, batch: Any) -> torch.Tensor:
        steps.append(1)
        return outputs.logits.sum() * 0 + (bad if len(steps) == 3 else 0.0)

    with pytest.raises(DivergedError, match=rf"^the loss is {bad} at optimizer step 2$"):
        train(learner_of(one, terms={"bad": term}), [one.batch()] * 5)
    assert all(bool(p.isfinite().all()) for p in one.model.parameters())


class OnGPU:
    """A loss that says it is on a GPU, and whether anybody waited for it."""

    def __init__(self, value: float, log: list[str]) -> None:
        self.is_cuda, self.value, self.log = True, value, log

    def detach(self) -> OnGPU:
        return self

    def to(self, device: str, non_blocking: bool) -> torch.Tensor:
        assert (device, non_blocking) == ("cpu", True)
        self.log.append(f"copy {self.value}")
        return torch.tensor(self.value)


def test_on_a_gpu_the_loss_of_the_step_before_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    finite = Finite()
    for step, value in enumerate((1.0, float("nan"))):
        finite.check(OnGPU(value, log), step)  # type: ignore[arg-type]
    assert log == ["copy 1.0", "record", "copy nan", "record", "wait"]  # each waits for the one before, just started
    with pytest.raises(DivergedError, match=r"^the loss is nan at optimizer step 1$"):
        finite.check(OnGPU(2.0, log), 2)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_not_saved(
    setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    one = setting()
    trainer = train(learner_of(one), [one.batch()])
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    one.model.classifier.bias.data[0] = float("nan")
    with pytest.raises(DivergedError, match="the weights are not finite after optimizer step 1"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["good.ckpt"]


def test_a_checkpoint_holds_no_pickled_object(
    setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    one = setting()
    train(learner_of(one), [one.batch()]).save_checkpoint(tmp_path / "it.ckpt")
    checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert {n.removeprefix("model.") for n in checkpoint["state_dict"]} == set(one.model.state_dict())


def test_the_randomness_goes_on_where_it_stopped(setting: Callable[..., Any]) -> None:
    learner = learner_of(setting())
    checkpoint: dict[str, Any] = {}
    learner.on_save_checkpoint(checkpoint)
    draw = lambda: (random.random(), float(numpy.random.rand()), float(torch.rand(())))  # noqa: E731
    expected = draw()
    pl.seed_everything(123, verbose=False)
    assert draw() != expected
    again = learner_of(setting())
    again.on_load_checkpoint(checkpoint)
    again.on_train_batch_start(None, 0)
    assert draw() == expected
    after = draw()
    again.on_train_batch_start(None, 1)  # once only
    assert draw() not in (expected, after)


def test_a_resumed_fit_with_dropout_ends_where_the_whole_one_does(
    setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Path
) -> None:
    def fresh() -> Any:
        one = setting()
        for module in one.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        return one

    def learner(one: Any) -> Learner:
        return learner_of(one, optimizer=AdamW(lr=0.01), steps=4)

    whole, first, second = fresh(), fresh(), fresh()
    batch = whole.batch()
    pl.seed_everything(7, verbose=False)
    train(learner(whole), [batch] * 2, max_epochs=2)
    pl.seed_everything(7, verbose=False)
    train(learner(first), [batch] * 2, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    pl.seed_everything(8, verbose=False)
    train(learner(second), [batch] * 2, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    state = whole.model.state_dict()
    assert not torch.equal(first.model.classifier.weight, state["classifier.weight"])
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.model.state_dict().items())
