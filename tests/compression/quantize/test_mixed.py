"""Mixed precision: the sensitivities against a plain loop over copies of the model, the choice against every choice."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.compression.prune.heads import Heads
from niwaki.compression.quantize.gptq import GPTQ
from niwaki.compression.quantize.integers import IntegerLinear
from niwaki.compression.quantize.mixed import Mixed, divergence, least_loss
from niwaki.compression.quantize.weight_only import WeightOnly
from niwaki.compression.share.codebook import CodebookSharing
from niwaki.compression.share.layers import Layers
from niwaki.errors import ConfigError
from niwaki.measure.size import target_table
from niwaki.stage import refuse_conflicts
from niwaki.tuning.lora import LoRA
from niwaki.weights import fold, links

KINDS = [
    ("bert", "classification"), ("llama", "causal_lm"), ("bart", "translation"), ("t5", "translation"),
    ("albert", "ner"), ("roberta", "masked_lm"), ("gpt2", "causal_lm"), ("deberta-v2", "ner"),
]  # fmt: skip


def halves(one: Any) -> list[dict[str, Tensor]]:
    """Two batches, of the first row and of the others."""
    features = one.features()
    return [one.task.collate(copy.deepcopy(part), one.tokenizer) for part in (features[:1], features[1:])]


def context_of(one: Any) -> Any:
    """One whose calibration rows come in batches that differ in size."""
    return replace(one.context(), calibration=lambda count: halves(one))


def probabilities(one: Any, model: Any) -> Tensor:
    """Of the positions of both batches that count."""
    with torch.no_grad():
        found = [one.task.counted(model(**one.task.inputs(batch)), batch)[0] for batch in halves(one)]
    return torch.cat(found).double().softmax(-1)


def rounded_by_hand(weight: Tensor, bits: int, group: int) -> Tensor:
    grouped, last = weight.view(len(weight), -1, group), 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True) / last
    return ((grouped / scale).round() * scale).view(weight.shape)


@pytest.mark.parametrize(("family", "task", "shared"), [*((*kind, None) for kind in KINDS), ("bert", "ner", [[0, 2]])])
def test_the_sensitivities_are_those_of_a_plain_loop(
    family: str, task: str, shared: Any, setting: Callable[..., Any]
) -> None:
    """`shared`: blocks that are one, and run before and after the others."""
    one = setting(family, task)
    one.model.eval()
    if shared:
        Layers(lists=shared).prepare(one.model, one.context())
    copied = copy.deepcopy(one.model)
    context = context_of(one)
    before = one.logits()
    Mixed(bits=3, choices=[2, 3, 5], group=16).prepare(one.model, context)
    found = context.facts["mixed_sensitivity"]
    assert list(found) == list(context.targets)
    whole = probabilities(one, copied)
    assert torch.equal(one.logits(copied), before)
    for name in [name for number, name in enumerate(found) if number % 3 == 0 or number > len(found) - 3]:
        weight = copied.get_submodule(name).weight.data
        kept = weight.clone()
        for bits in (2, 3, 5):
            weight.copy_(rounded_by_hand(kept, bits, 16))
            other = probabilities(one, copied)
            expected = float((whole * (whole.log() - other.log())).sum(-1).mean())
            assert found[name][f"{bits}"] == pytest.approx(expected, rel=1e-3, abs=1e-9)
        weight.copy_(kept)
    assert max(losses["2"] for losses in found.values()) > 0
    for module in one.model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks


def test_the_divergence_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("niwaki.compression.quantize.mixed.LARGEST_PART", 12)
    first = torch.log(torch.tensor([[0.5, 0.25, 0.25]] * 5))
    second = torch.log(torch.tensor([[0.125, 0.25, 0.625]] * 5))
    by_hand = 0.5 * torch.log(torch.tensor(4.0)) + 0.25 * torch.log(torch.tensor(0.4))
    assert divergence(first + 3, second) == pytest.approx(5 * float(by_hand), rel=1e-6)


def test_the_choice_of_three_linears_is_that_found_by_hand() -> None:
    """Of 10, 10 and 20 weights at 2, 3 or 4 bits, 3 on average (120): to give the large one its third bit (0.9 for 20)
    and the second one two more (1.1 for 20) is best, though the first step of the first one gains most for a bit."""
    costs = [[20, 30, 40], [20, 30, 40], [40, 60, 80]]
    losses = [[1.0, 0.45, 0.44], [1.5, 1.3, 0.4], [1.0, 0.1, 0.05]]
    assert least_loss(costs, losses, 120) == [0, 2, 1]
    assert least_loss(costs, losses, 119) == [1, 2, 0]
    assert least_loss(costs, losses, 80) == [0, 0, 0]
    assert least_loss(costs, losses, 160) == [2, 2, 2]
    assert least_loss([[20, 30]], [[0.1, 0.1]], 40) == [0]  # nothing is gained


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (5,), generator=generator).tolist()
    costs = [[size * bits for bits in (4, 2, 8, 3)] for size in sizes]
    losses = torch.rand(5, 4, generator=generator).tolist()  # more bits may be worse
    for budget in (2 * sum(sizes), int(2.7 * sum(sizes)), 4 * sum(sizes), 7 * sum(sizes)):
        allowed = [
            (sum(loss[number] for loss, number in zip(losses, choice, strict=True)), choice)
            for choice in itertools.product(range(4), repeat=5)
            if sum(cost[number] for cost, number in zip(costs, choice, strict=True)) <= budget
        ]
        assert least_loss(costs, losses, budget) == list(min(allowed)[1])


def converted(one: Any, stage: Any, context: Any = None) -> tuple[Any, dict[str, IntegerLinear]]:
    """The context of a model that was quantized, and its integers by name."""
    context = context or context_of(one)
    stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    stage.finalize(one.model, context)
    named = one.model.named_modules()
    return context, {name: module for name, module in named if isinstance(module, IntegerLinear)}


@pytest.mark.parametrize("bits", [2, 2.5, 3.1, 4.0, 7.9])
def test_the_file_holds_what_the_average_allows_and_nothing_better_fits(
    bits: float, setting: Callable[..., Any]
) -> None:
    one = setting()
    context, integers = converted(one, Mixed(bits=bits, group=16))
    table = target_table(one.model, context.targets)
    chosen, omega = context.facts["mixed_bits"], context.facts["mixed_sensitivity"]
    assert {name: row["bits"] for name, row in table.items()} == chosen
    total = sum(row["parameters"] for row in table.values())
    used = sum(row["parameters"] * row["bits"] for row in table.values())
    assert used <= bits * total
    assert sum(module.codes.numel() for module in integers.values()) == used / 8
    facts = context.facts["mixed"]
    assert facts["average_bits"] == used / total
    assert facts["divergence"] == pytest.approx(sum(omega[name][f"{found}"] for name, found in chosen.items()))
    for name, found in chosen.items():
        for other in (2, 3, 4, 8):
            if omega[name][f"{other}"] < omega[name][f"{found}"]:
                assert used + table[name]["parameters"] * (other - found) > bits * total
    if 2 < bits < 7:
        assert len(set(chosen.values())) > 1


@pytest.mark.parametrize(
    ("rounding", "uniform"), [("nearest", WeightOnly(bits=3, group=8)), ("gptq", GPTQ(bits=3, group=8))]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_with_the_same_bits_for_all_it_is_the_method_of_one_width(
    rounding: Any, uniform: Any, symmetric: bool, setting: Callable[..., Any]
) -> None:
    _, ours = converted(setting(), Mixed(bits=3, choices=[3], group=8, symmetric=symmetric, rounding=rounding))
    one = setting()
    _, theirs = converted(one, replace(uniform, symmetric=symmetric))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name].codes, theirs[name].codes) for name in ours)
    assert all(torch.equal(ours[name].scale, theirs[name].scale) for name in ours)


def test_gptq_has_the_bits_that_were_chosen_and_the_nearest_of_zero_stays(setting: Callable[..., Any]) -> None:
    one = setting()
    with torch.no_grad():
        for linear in one.context().targets.values():
            linear.weight[:, ::2] = 0.0
    context, integers = converted(one, Mixed(bits=3.3, group=16, rounding="gptq"))
    assert {name: module.bits for name, module in integers.items()} == context.facts["mixed_bits"]
    assert all(bool((module.dequantized()[:, ::2] == 0).all()) for module in integers.values())
    _, nearest = converted(setting(), Mixed(bits=3.3, group=16))
    assert any(not torch.equal(integers[name].codes, nearest[name].codes) for name in integers)


def test_it_is_the_merged_weight_whose_rounding_is_measured(setting: Callable[..., Any]) -> None:
    one, merged = setting(), setting()
    context = context_of(one)
    lora = LoRA()
    lora.prepare(one.model, context)
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    lora.link(one.model, context)
    for name, linear in context.targets.items():
        merged.model.get_submodule(name).weight.data.copy_(linear.weight.detach())
    other = context_of(merged)
    Mixed(group=16).prepare(one.model, context)
    Mixed(group=16).prepare(merged.model, other)
    assert context.facts["mixed_bits"] == other.facts["mixed_bits"]
    for name, losses in context.facts["mixed_sensitivity"].items():
        assert losses == pytest.approx(other.facts["mixed_sensitivity"][name], rel=1e-2, abs=1e-8)


def test_the_same_rows_give_the_same_choice(setting: Callable[..., Any]) -> None:
    found = [converted(setting(), Mixed(bits=2.6, group=16))[0].facts for _ in range(2)]
    assert found[0] == found[1]


def test_only_the_targets_are_counted_and_rounded(setting: Callable[..., Any]) -> None:
    one = setting()
    expected = set(one.context().anatomy.part_names(("feed_in",)))
    context, integers = converted(one, Mixed(bits=3, group=16, targets=["feed_in"]))
    assert set(integers) == set(context.facts["mixed_bits"]) == expected
    assert all(not links(linear) for linear in context.targets.values())


@pytest.mark.parametrize("calibration", [[], None])
def test_rows_without_a_position_that_counts_are_refused(calibration: Any, setting: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    empty = one.batch()
    empty["labels"] = torch.full_like(empty["labels"], -100)
    context = replace(one.context(), calibration=lambda count: [empty] if calibration is None else calibration)
    with pytest.raises(ConfigError, match=r"^compression\.mixed\.rows=128: the training split has no position"):
        Mixed(group=16).prepare(one.model, context)


def test_predictions_that_are_no_numbers_are_refused(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    with torch.no_grad():
        one.model.get_submodule(list(context.targets)[-1]).bias[0] = torch.nan
    with pytest.raises(ConfigError, match=r"^compression\.mixed: .* are no finite numbers"):
        Mixed(group=16).prepare(one.model, context)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 1.9}, r"bits=1\.9: needs a number from 2 to 8"), ({"bits": 8.5}, r"bits=8\.5: needs"),
        ({"bits": float("nan")}, "bits=nan: needs"),
        ({"bits": 3, "choices": [4, 6]}, r"bits=3: needs a number from 4 to 6, the ends of choices=\[4, 6\]"),
        ({"choices": []}, r"choices=\[\]: needs whole numbers from 2 to 8, at least one"),
        ({"choices": [2, 4, 4]}, r"choices=\[2, 4, 4\]: needs .* each once"),
        ({"choices": [1, 4]}, r"choices=\[1, 4\]: needs"), ({"choices": [4, 9]}, r"choices=\[4, 9\]: needs"),
        ({"group": 1}, "group=1: needs null or"), ({"rows": 0}, "rows=0: needs a whole"),
        ({"rounding": "up"}, "rounding='up': needs one of nearest, gptq"), ({"targets": ["head"]}, "targets="),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.mixed\.{said}"):
        Mixed(**fields)


def test_a_group_that_divides_no_width_is_refused(setting: Callable[..., Any]) -> None:
    context = setting().context()
    with pytest.raises(ConfigError, match=r"^compression\.mixed\.group=24: .* has 32 inputs, which it does not divide"):
        Mixed(group=24).check(context.anatomy, context.targets)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (CodebookSharing(), "quantize/mixed and share/codebook: it chooses the code of each weight by itself"),
        (Heads(schedule="cubic"), "quantize/mixed and prune/heads: how many weights each linear will have"),
    ],
)
def test_what_leaves_no_choice_by_weight_or_no_count_is_refused(other: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        refuse_conflicts([other, Mixed(group=None)])


def test_heads_that_go_before_the_fit_are_no_reason() -> None:
    stages: Sequence[Any] = [Heads(schedule="one_shot"), Mixed()]
    refuse_conflicts(stages)
