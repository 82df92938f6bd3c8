"""CoFi: hard concrete masks, expected size and multipliers by hand; the match of layers; and that it gets there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from niwaki.compression.prune import hard_concrete
from niwaki.compression.prune.cofi import CoFi
from niwaki.compression.prune.cofi_masks import (
    Masks,
    Multipliers,
    SizePenalty,
    add_masks,
    last_step,
    masks_of,
)
from niwaki.compression.prune.heads import Heads
from niwaki.compression.prune.layer_match import matched_distance, spread
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.stream_mask import add_stream_mask, norm_of
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.stream import stream_of
from niwaki.model.teacher import Teacher
from niwaki.model.tiny import FAMILIES, Tiny
from niwaki.model.units import units_of
from niwaki.optimizer import AdamW
from niwaki.stage import refuse_conflicts
from niwaki.task.classification import Classification
from niwaki.tuning.gradual import Gradual
from niwaki.tuning.lora import LoRA
from niwaki.tuning.prompt import PromptTuning


def test_draws_of_the_hard_concrete_by_hand() -> None:
    # log alpha 0, beta 2/3: the odds of u to the power 3/2. u = 0.2: (1/4)^1.5 = 1/8, s = 1/9, z = 1.2/9 - 0.1
    uniform = torch.tensor([0.1, 0.2, 0.5, 0.8, 0.9])
    z = hard_concrete.sample(torch.zeros(5), uniform)
    assert z.tolist() == pytest.approx([0.0, 1.2 / 9 - 0.1, 0.5, 8 * 1.2 / 9 - 0.1, 1.0], abs=1e-6)
    assert float(hard_concrete.sample(torch.tensor(math.log(2.0)), torch.tensor(0.5))) == pytest.approx(
        1.2 * 2**1.5 / (1 + 2**1.5) - 0.1
    )


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_the_probability_of_a_zero_is_that_of_the_draws(log_alpha: float) -> None:
    draws = hard_concrete.sample(torch.tensor(log_alpha), torch.rand(200_000))
    assert float(hard_concrete.open_probability(torch.tensor(log_alpha))) == pytest.approx(
        float((draws > 0).float().mean()), abs=5e-3
    )


def test_the_probability_at_zero_by_hand() -> None:
    # sigmoid(2/3 log 11) = 11^(2/3) / (1 + 11^(2/3))
    assert float(hard_concrete.open_probability(torch.zeros(()))) == pytest.approx(11 ** (2 / 3) / (1 + 11 ** (2 / 3)))


def test_the_mask_that_is_kept_has_as_many_zeros_as_are_expected() -> None:
    log_alpha = torch.tensor([3.0, -6.0, -1.6, 2.0, -1.7])  # open with .99, .01, .50, .97 and .47: 2.94 of 5
    assert hard_concrete.settled(log_alpha).tolist() == [True, False, True, True, False]
    assert hard_concrete.settled(torch.full((4,), -9.0)).tolist() == [False] * 4


def test_expected_sparsity_is_the_papers_sum(setting: Callable[..., Any]) -> None:
    """1/M (4 d_h sum_i sum_j sum_k z_MHA z_head + 2 sum_i sum_j sum_k z_FFN z_int), with d = 32, d_h = 8, d_f = 64."""
    one = setting()
    anatomy = Anatomy.of(one.model)
    found = [*units_of(anatomy, "heads"), *units_of(anatomy, "neurons")]
    masks = add_masks(one.model, found, ("heads", "neurons", "attention", "feed_forward"), 0)
    with torch.no_grad():
        for mask in masks:
            for parameter in mask.parameters():
                parameter.copy_(torch.randn(parameter.shape))

    def p(log_alpha: float) -> float:
        return 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1))))

    size = 0.0
    for mask in masks:
        each = 4 * 8 * 32 if mask.units.kind == "heads" else 2 * 32
        for j in range(4 if mask.units.kind == "heads" else 64):
            size += each * p(float(mask.layer.detach()[0])) * p(float(mask.unit.detach()[j]))
    whole = 3 * (4 * 32 * 32 + 2 * 32 * 64)
    assert float(Masks(masks).expected_sparsity().detach()) == pytest.approx(1 - size / whole, rel=1e-5)
    assert len(masks) == 6


def test_the_multipliers_climb_and_the_masks_descend() -> None:
    multipliers = Multipliers("cpu")
    multipliers.first.data.fill_(0.5)
    multipliers.second.data.fill_(2.0)
    distance = torch.tensor([-0.3], requires_grad=True)
    value = multipliers(distance)
    assert float(value.detach()) == pytest.approx(0.5 * -0.3 + 2 * 0.09)
    value.backward()
    assert float(multipliers.first.grad) == pytest.approx(0.3)  # minus that of (s - t): too little drives it down
    assert float(multipliers.second.grad) == pytest.approx(-0.09)
    assert float(distance.grad) == pytest.approx(0.5 + 2 * 2 * -0.3)


def test_the_target_grows_linearly() -> None:
    penalty = SizePenalty(Masks([]), Multipliers("cpu"), 0.8, 4)
    assert [penalty.target_at(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.2, 0.4, 0.8, 0.8])
    assert [last_step(0.6, steps) for steps in (1, 5, 6, 10)] == [1, 3, 4, 6]


def test_masks_are_one_draw_for_a_batch_and_another_for_the_next(setting: Callable[..., Any]) -> None:
    one = setting()
    mask = add_masks(one.model, units_of(Anatomy.of(one.model), "neurons"), ("neurons",), 0)[0]
    mask.train()
    first = mask.factors()
    assert torch.equal(mask.factors(), first)
    mask.forget()
    assert not torch.equal(mask.factors(), first)
    mask.eval()
    assert set(mask.factors().tolist()) == {0.0, 1.0}


def test_without_a_mask_of_the_whole_one_unit_stays(setting: Callable[..., Any]) -> None:
    one = setting()
    heads = units_of(Anatomy.of(one.model), "heads")
    mask = add_masks(one.model, heads, ("heads",), 0)[0]
    mask.unit.data.copy_(torch.tensor([-9.0, -8.0, -7.0, -9.0]))
    assert mask.expected().tolist() == [0, 0, 1, 0]
    whole = add_masks(setting().model, heads, ("heads", "attention"), 0)[0]
    whole.unit.data.copy_(torch.tensor([9.0, 9.0, 9.0, 9.0]))
    whole.layer.data.fill_(-9.0)
    assert whole.expected().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_the_multipliers_bring_the_expected_size_to_its_target(setting: Callable[..., Any], target: float) -> None:
    one = setting()
    anatomy = Anatomy.of(one.model)
    found = [*units_of(anatomy, "heads"), *units_of(anatomy, "neurons")]
    masks = add_masks(one.model, found, ("heads", "neurons", "attention", "feed_forward"), 0)
    penalty = SizePenalty(Masks(masks), Multipliers("cpu"), target, 200)
    learning = [p for module in (*masks, penalty.multipliers) for p in module.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=0.05, weight_decay=0.0)
    for penalty.step in range(800):
        optimizer.zero_grad()
        penalty(None, {}).backward()
        optimizer.step()
    assert float(Masks(masks).expected_sparsity().detach()) == pytest.approx(target, abs=0.01)


def test_channels_count_in_the_expected_sparsity(setting: Callable[..., Any]) -> None:
    """Each weight of a unit belongs to one channel: sum over units and channels of P(z_unit) P(z_channel)."""
    one = setting()
    anatomy = Anatomy.of(one.model)
    sublayers = add_masks(one.model, units_of(anatomy, "neurons"), ("neurons",), 0)
    stream = add_stream_mask(one.model, stream_of(anatomy), 0)
    assert stream is not None
    stream.channel.data.copy_(torch.linspace(-3, 3, 32))
    size = sum(
        2 * float(unit) * float(channel)
        for mask in sublayers
        for unit in mask.probability().detach()
        for channel in stream.probability().detach()
    )
    found = Masks(sublayers, stream).expected_sparsity()
    assert float(found.detach()) == pytest.approx(1 - size / (3 * 2 * 64 * 32), rel=1e-5)


def test_a_norm_over_the_channels_that_stay_by_hand() -> None:
    norm, stays = torch.nn.LayerNorm(6), torch.tensor([0, 2, 5])
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    values = torch.randn(2, 3, 6)
    left = values[..., stays]
    mean, variance = left.mean(-1, keepdim=True), left.var(-1, unbiased=False, keepdim=True)
    expected = (left - mean) / (variance + norm.eps).sqrt() * norm.weight[stays] + norm.bias[stays]
    torch.testing.assert_close(norm_of(norm, values, stays), expected)
    assert norm.normalized_shape == (6,)


def drawn(one: Any, masks: tuple[str, ...], *, stream: bool = False) -> Masks:
    """Masks with log alphas at random, as if they had learned."""
    anatomy = Anatomy.of(one.model)
    found = [*units_of(anatomy, "heads"), *units_of(anatomy, "neurons")]
    made = Masks(
        add_masks(one.model, found, masks, 0), add_stream_mask(one.model, stream_of(anatomy) if stream else None, 0)
    )
    with torch.no_grad():
        for mask in made.each:
            for parameter in mask.parameters():
                parameter.copy_(2 * torch.randn(parameter.shape))
    return made


ALL = ("heads", "neurons", "attention", "feed_forward")


@pytest.mark.parametrize("target", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(("masks", "stream", "largest"), [
    (ALL, False, 1024), (("heads", "neurons"), False, 1024), (("neurons",), True, 2 * 3 * 64),
    (("attention",), False, 4096),
])  # fmt: skip
def test_masks_settle_as_near_to_the_target_as_units_allow(
    setting: Callable[..., Any], target: float, masks: tuple[str, ...], stream: bool, largest: int
) -> None:
    found = drawn(setting(), masks, stream=stream)
    whole = sum(mask.size * mask.units.count for mask in found.sublayers)
    expected = [mask.expected() for mask in found.each]
    found.settle(target)
    most = 1.0 if "attention" in masks or stream else 1 - 3 * (1024 + 64) / whole  # one of each stays
    assert found.real_sparsity() == pytest.approx(min(target, most), abs=largest / whole / 2 + 1e-6)
    grown = sum(int((mask.open.bool() & ~old.bool()).sum()) for mask, old in zip(found.each, expected, strict=True))
    gone = sum(int((~mask.open.bool() & old.bool()).sum()) for mask, old in zip(found.each, expected, strict=True))
    assert not (grown and gone)  # more than what was expected to close, or less, never others
    assert all(mask.is_settled for mask in found.each)


def test_where_the_expectation_meets_the_target_it_is_kept(setting: Callable[..., Any]) -> None:
    found = drawn(setting(), ALL)
    expected = [mask.expected() for mask in found.sublayers]
    size = sum(float(open.sum()) * mask.size for open, mask in zip(expected, found.sublayers, strict=True))
    found.settle(1 - size / 24576)
    assert all(torch.equal(mask.open, open) for mask, open in zip(found.sublayers, expected, strict=True))


def test_the_order_in_which_units_close_by_hand(setting: Callable[..., Any]) -> None:
    """Three sublayers of 4 heads, one of them with a z_layer that is likely zero: its heads go first."""
    found = drawn(setting(), ("heads", "attention"))
    with torch.no_grad():
        for layer, mask in zip((-4.0, 9.0, 9.0), found.sublayers, strict=True):
            mask.layer.fill_(layer)  # type: ignore[union-attr]
            mask.unit.copy_(torch.tensor([9.0, 8.0, 7.0, 6.0]))  # type: ignore[union-attr, operator]
        found.sublayers[2].unit[1] = -1.0  # type: ignore[index]  # open with 0.65: not expected to close, yet next
    found.settle(5 / 12)
    assert [mask.open.tolist() for mask in found.sublayers] == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    found.settle(1 / 4)
    assert [mask.open.tolist() for mask in found.sublayers] == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_channels_are_cut(setting: Callable[..., Any], train: Callable[..., Any], family: str) -> None:
    one = setting(family)
    stage = CoFi(sparsity=0.69, masks=["neurons", "hidden"], warmup=0.1, end=0.5)
    context = one.context(steps=4)
    effects = stage.prepare(one.model, context)
    mask: Any = one.model.cofi_stream_mask
    with torch.no_grad():
        mask.channel[:20] = -12.0
    train(one.learner(AdamW(lr=1e-3), [effects], 4), [one.batch()] * 4, callbacks=effects.callbacks)
    masked = one.logits()
    edits = stage.finalize(one.model, context)
    assert edits[0].to_json()["kept"] == len(context.facts["kept_channels"]) == 12
    assert context.facts["cofi_sparsity"] == pytest.approx(0.69, abs=0.02)
    assert float((one.logits() - masked).abs().max()) < 1e-5
    assert not any(one.model.get_submodule(name)._forward_hooks for name in mask.stream.norms)
    assert not [name for name in one.model.state_dict() if "cofi" in name]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_closed_at_the_end_is_cut(setting: Callable[..., Any], train: Callable[..., Any], family: str) -> None:
    one = setting(family)
    context, steps = one.context(steps=50), 50
    stage = CoFi(sparsity=0.7, warmup=0.1, end=0.9, lr_factor=100)
    effects = stage.prepare(one.model, context)
    assert effects.settled == 45
    assert len(effects.lr_factors) == 2 * 6 + 2
    learner = one.learner(AdamW(lr=1e-3), [effects], steps)
    learner.lr_factors = effects.lr_factors
    train(learner, [one.batch()] * steps, callbacks=effects.callbacks)
    masked = one.logits()
    edits = stage.finalize(one.model, context)
    assert float((one.logits() - masked).abs().max()) < 1e-5
    assert context.facts["cofi_sparsity"] == pytest.approx(0.7, abs=1024 / 24576 / 2)  # half of a head
    assert not [name for name in one.model.state_dict() if "cofi" in name or "_mask" in name]
    assert [edit.kind for edit in edits] == ["heads", "neurons"]  # type: ignore[attr-defined]


def test_the_match_of_layers_by_hand() -> None:
    tokens = torch.tensor([[True, False], [True, True]])
    students = [torch.zeros(3, 1), torch.full((3, 1), 2.0)]
    teachers = [torch.tensor([[[1.0], [99.0]], [[0.0], [0.0]]]), torch.tensor([[[2.0], [99.0]], [[2.0], [5.0]]])]
    # the first is nearest to zeros: 1/3; the second to twos: 9/3
    assert float(matched_distance(students, teachers, tokens)) == pytest.approx(1 / 3 + 3)
    layers = [torch.tensor(float(i)) for i in range(1, 13)]
    assert [int(layer) for layer in spread(layers)] == [3, 6, 9, 12]
    assert [int(layer) for layer in spread(layers[:6])] == [1, 3, 4, 6]
    assert len(spread(layers[:3])) == 3


def test_a_teacher_leaves_no_trace(setting: Callable[..., Any], train: Callable[..., Any], tmp_path: Any) -> None:
    one, teacher = setting(), setting(seed=1).model
    context = one.context(steps=4, load_teacher=lambda place, field: Teacher(teacher))
    names = set(one.model.state_dict())
    stage = CoFi(teacher="some/model", layer_weight=2.0)
    effects = stage.prepare(one.model, context)
    assert set(effects.terms) == {"prune/cofi", "prune/cofi layers"}
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trainer = train(one.learner(AdamW(lr=0.01), effects=[effects]), [one.batch()] * 4, callbacks=effects.callbacks)
    projection: Any = effects.modules["prune/cofi layers"]
    assert not torch.equal(projection.weight, torch.eye(32))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "teacher" in name or "match" in name]
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    stage.finalize(one.model, context)
    assert set(one.model.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())


def test_a_tuning_that_freezes_does_not_freeze_the_masks(
    setting: Callable[..., Any], train: Callable[..., Any]
) -> None:
    one = setting()
    context = one.context(steps=3)
    effects = CoFi(masks=["heads"], end=1.0).prepare(one.model, context)
    LoRA(rank=2).prepare(one.model, context)
    masks = masks_of(one.model).sublayers
    before = [mask.unit.detach().clone() for mask in masks]
    assert not any(mask.unit.requires_grad for mask in masks)
    train(one.learner(AdamW(lr=0.01), [effects], 3), [one.batch()] * 3, callbacks=effects.callbacks)
    assert all(not torch.equal(mask.unit, old) for mask, old in zip(masks, before, strict=True))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sparsity": 0.0}, "sparsity"), ({"sparsity": 1.0}, "sparsity"), ({"masks": []}, "masks"),
        ({"masks": ["hidden"]}, "masks"), ({"masks": ["heads", "heads"]}, "masks"), ({"warmup": 0.7}, "warmup"),
        ({"end": 1.1}, "warmup"), ({"lr_factor": 0.0}, "lr_factor"), ({"layer_weight": 1.0}, "layer_weight"),
        ({"layer_weight": -1.0, "teacher": "x"}, "layer_weight"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.cofi\.{name}=") as caught:
        CoFi(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([CoFi(), Heads()], "prune/cofi and prune/heads: each decides which heads stay"),
        ([CoFi(), QAT(group=8)], "prune/cofi and quantize/qat with groups"),
        ([CoFi(), Magnitude(pattern="2:4")], "prune/cofi and prune/magnitude with groups"),
        ([CoFi(), LoRA(merge=False)], "tuning=lora with tuning.merge=false"),
        ([CoFi(), Gradual()], "tuning=gradual"),
        ([CoFi(teacher="x"), PromptTuning()], "tuning=prompt: the teacher has no virtual tokens"),
    ],
)
def test_pairs_that_are_refused(stages: list[Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        refuse_conflicts(stages)
    refuse_conflicts([CoFi(), QAT(), Magnitude(), LoRA()])


def test_an_attention_that_holds_its_norm_cannot_go_whole() -> None:
    anatomy = Anatomy.of(Tiny(name="albert").empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match="an attention of this family holds its norm too"):
        CoFi().check(anatomy, {})
    CoFi(masks=["heads", "neurons", "feed_forward"]).check(anatomy, {})


def test_masks_need_a_fit() -> None:
    assert CoFi().needs_fit() == "compression.cofi: has no effect with trainer.max_epochs=0; masks learn in a fit"
