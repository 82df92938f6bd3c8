"""AdaLoRA: PEFT's own loop by hand, the schedule of the paper, and the ranks in what is saved."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import pytorch_lightning as pl
import torch

from niwaki import artifact, compose, pipeline
from niwaki.optimizer import SGD
from niwaki.tuning.adalora import AdaLoRA, Orthogonality, Ranks, RankSchedule, ranks

STEPS = 10


class Count(pl.Callback):
    """The ranks that are left after each optimizer step."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.left[trainer.global_step] = sum(ranks(module.model).values())  # type: ignore[arg-type]


def batches(one: Any) -> list[Any]:
    pairs = [one.batch({k: v[i : i + 2] for k, v in one.rows.items()}) for i in (0, 2, 4, 6)]
    return [pairs[i % 4] for i in range(2 * STEPS)]


@pytest.mark.parametrize("orthogonality", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_it_is_peft_s_loop_by_hand_with_accumulated_gradients(
    setting: Callable[..., Any], train: Callable[..., Any], orthogonality: float
) -> None:
    one, other = setting(), setting()
    tuning = AdaLoRA(
        rank=4, target_rank=2, alpha=8.0, begin=0.2, end=0.8, interval=2, betas=(0.7, 0.6), orthogonality=orthogonality
    )
    names, head = list(other.context().targets), list(other.context().anatomy.head_parameters().values())
    torch.manual_seed(3)
    effects = tuning.prepare(one.model, one.context(STEPS))
    learner = one.learner(SGD(lr=0.5, momentum=0.0), [effects], STEPS)
    train(learner, batches(one), callbacks=effects.callbacks, accumulate_grad_batches=2)
    torch.manual_seed(3)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, tinit=2, tfinal=2, total_step=STEPS, deltaT=2, beta1=0.7, beta2=0.6,
        orth_reg_weight=orthogonality, target_modules=names,
    )  # fmt: skip
    reference = peft.get_peft_model(other.model, config).base_model
    for parameter in head:
        parameter.requires_grad_(True)
    reference.train()
    learning = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.5)
    rows = batches(other)
    for step in range(1, STEPS + 1):
        for batch in rows[2 * step - 2 : 2 * step]:
            (reference(**other.task.inputs(batch), labels=batch["labels"]).loss / 2).backward()
        optimizer.step()
        reference.update_and_allocate(step)
        optimizer.zero_grad()
    left, expected = ranks(one.model), ranks(reference.model)
    assert left == expected
    assert sum(left.values()) == 2 * len(names)
    assert len(set(left.values())) > 1
    state = reference.model.state_dict()
    assert all(torch.allclose(v, state[n], atol=1e-5) for n, v in one.model.state_dict().items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_budget_falls_as_in_the_paper_once_per_optimizer_step(
    setting: Callable[..., Any], train: Callable[..., Any], accumulate: int
) -> None:
    one = setting()
    effects = AdaLoRA(rank=4, target_rank=1, begin=0.2, end=0.8, interval=1).prepare(one.model, one.context(STEPS))
    count = Count()
    rows = batches(one)[: STEPS * accumulate]
    train(one.learner(SGD(lr=0.1), [effects], STEPS), rows, callbacks=[*effects.callbacks, count],
          accumulate_grad_batches=accumulate)  # fmt: skip
    whole, final = 4 * 18, 1 * 18
    falling = {t: int((whole - final) * (1 - (t - 2) / 6) ** 3 + final) for t in range(3, 9)}  # equation 12
    # A rank counts as left where its entry is not zero: all but those masked have been moved by the optimizer.
    assert {t: count.left[t] for t in range(1, 3)} == dict.fromkeys((1, 2), whole)
    assert {t: count.left[t] for t in falling} == falling
    assert [count.left[t] for t in (9, 10)] == [final, final]
    assert effects.settled == 8


def test_the_orthogonality_term_by_hand(setting: Callable[..., Any]) -> None:
    one = setting()
    AdaLoRA(rank=2, target_rank=1, parts=["query"]).prepare(one.model, one.context())
    for name, parameter in one.model.named_parameters():
        if ".lora_A." in name:  # Q Q^T = diag(1, 4): distance 3
            parameter.data = torch.eye(2, 32) * torch.tensor([[1.0], [2.0]])
        if ".lora_B." in name:  # P^T P = 2 I: distance sqrt(2)
            parameter.data = torch.eye(32, 2) * 2**0.5
    term = Orthogonality(one.model, 0.1)
    assert float(term(None, {}).detach()) == pytest.approx(0.1 * (3 + 2**0.5) / 2)


def test_the_term_is_in_the_loss_unless_it_weighs_nothing(setting: Callable[..., Any]) -> None:
    assert set(AdaLoRA().prepare((one := setting()).model, one.context()).terms) == {"orthogonality"}
    assert AdaLoRA(orthogonality=0.0).prepare((one := setting()).model, one.context()).terms == {}


def test_a_checkpoint_holds_what_peft_keeps_beside_the_model(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one = setting()
    effects = AdaLoRA(rank=4, target_rank=2, interval=1).prepare(one.model, one.context(STEPS))
    train(one.learner(SGD(lr=0.1), [effects], STEPS), batches(one)[:5], callbacks=effects.callbacks)
    (schedule,) = effects.callbacks
    assert isinstance(schedule, RankSchedule)
    state = schedule.state_dict()
    assert state["done"] == 5
    factors = {n for n, _ in one.model.named_parameters() if ".lora_" in n}
    assert {name: set(scores) for name, scores in state["scores"].items()} == {
        name: factors for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")
    }
    assert sum(map(sum, state["pattern"].values())) == sum(ranks(one.model).values())


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 12345])
@pytest.mark.parametrize(("begin", "end"), [(0.1, 0.7), (0.0, 1.0), (0.0, 0.01), (0.99, 1.0), (0.5, 0.51)])
def test_the_schedule_fits_into_every_fit(steps: int, begin: float, end: float) -> None:
    first, last = AdaLoRA(begin=begin, end=end).span(steps)
    assert 0 <= first < last <= steps


@pytest.mark.parametrize("compression", ["[]", "[prune/magnitude,quantize/qat]"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_a_few_steps_reports_and_saves_its_ranks(tmp_path: Path, compression: str, steps: int) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}", "label": "yn"[i % 2]}) + "\n" for i in range(48)))
    config = compose.compose(
        ["data=files", f"data.train={file}", "model=tiny-bert", "trainer=debug", "logger=none", "tuning=adalora",
         f"compression={compression}", "measure.repeats=0", "optimizer.lr=1e-3", "data.batch_size=8",
         f"trainer.max_steps={steps}"]
    ).config  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    pipeline.run(compose.build(config), folder, config)
    told = json.loads((folder / "metrics.json").read_text())["ranks"]
    assert (told["sum"], told["budget"], told["before"]) == (8 * 18, 8 * 18, {"12": 18})
    assert sum(told["after"].values()) == 18
    assert sum(int(rank) * count for rank, count in told["after"].items()) == 8 * 18
    (saved,) = [edit for edit in artifact.load(folder / "model").edits if isinstance(edit, Ranks)]
    assert {str(rank): count for rank, count in Counter(saved.ranks.values()).items()} == told["after"]
    assert saved.ranks.keys() == {
        f"bert.encoder.layer.{i}.{part}"
        for i in range(3)
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                     "intermediate.dense", "output.dense")
    }  # fmt: skip


def test_the_merge_has_the_rank_that_is_left(setting: Callable[..., Any], train: Callable[..., Any]) -> None:
    one, base = setting(), setting()
    context, tuning = one.context(STEPS), AdaLoRA(rank=4, target_rank=2, alpha=64.0)
    effects = tuning.prepare(one.model, context)
    train(one.learner(SGD(lr=0.5), [effects], STEPS), batches(one)[:STEPS], callbacks=effects.callbacks)
    left = ranks(one.model)
    assert len(set(left.values())) > 1
    assert [edit.ranks for edit in tuning.finalize(one.model, context) if isinstance(edit, Ranks)] == [left]
    for name, rank in left.items():
        delta = one.model.get_submodule(name).weight.detach() - base.model.get_submodule(name).weight.detach()
        assert int(torch.linalg.matrix_rank(delta, atol=1e-6)) <= rank
        assert bool(delta.any()) == bool(rank)


def test_a_step_that_fp16_left_out_does_not_spoil_the_scores(setting: Callable[..., Any]) -> None:
    one = setting()
    (schedule,) = AdaLoRA(rank=4, target_rank=2).prepare(one.model, one.context(STEPS)).callbacks
    one.task.loss(one.model(**one.task.inputs(one.batch())), one.batch()).backward()
    for parameter in one.model.parameters():
        if parameter.grad is not None:
            parameter.grad.view(-1)[0] = float("inf")
    trainer: Any = type("Trainer", (), {"global_step": 1})
    schedule.on_train_batch_end(trainer, one.learner(), None, None, 0)
    scores = [score for kind in schedule.state_dict()["scores"].values() for score in kind.values()]
    assert len(scores) == 3 * 3 * 18
    assert all(bool(torch.isfinite(score).all()) for score in scores)
