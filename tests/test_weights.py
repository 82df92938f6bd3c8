"""The chain of links on a linear: order, what enters a link, and a fold that changes no output by one bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.mask import Mask
from niwaki.compression.quantize.int8 import Int8
from niwaki.compression.quantize.integers import IntegerGrid, IntegerLinear
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.share.stored import CodebookLinear
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.stage import Phase, ordered, refuse_conflicts
from niwaki.tuning.delta import adapters, unload
from niwaki.tuning.full import Full
from niwaki.tuning.lora import LoRA
from niwaki.tuning.normal_float import NormalFloatLinear
from niwaki.weights import (
    Link,
    Packed,
    entering,
    fold,
    links,
    replace_module,
    shared_parameters,
    stack,
)


class Add(Link):
    phase = Phase.TUNE

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.register_buffer("delta", delta)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


def linear_of(*rows: list[float]) -> nn.Linear:
    linear = nn.Linear(len(rows[0]), len(rows), bias=False)
    linear.weight.data = torch.tensor(rows)
    return linear


def mask_of(linear: nn.Linear, *rows: list[int]) -> Mask:
    mask = Mask(linear.weight.shape, linear.weight.device)
    mask.mask.copy_(torch.tensor(rows, dtype=torch.bool))
    return mask


def chain() -> tuple[nn.Linear, list[Link]]:
    linear = linear_of([1.0, -3.0, 3.0, 0.5])
    stacked = [Add(torch.tensor([[0.0, 0.0, 1.0, 0.0]])), mask_of(linear, [0, 1, 1, 1]), IntegerGrid(3, None)]
    for link in stacked:
        stack(linear, link)
    return linear, stacked


def test_a_chain_worked_by_hand() -> None:
    # 1 -3 3 .5 -> +delta: 1 -3 4 .5 -> mask: 0 -3 4 .5 -> grid of 4/3 (q = 3): 0 -2 3 0 steps
    linear, _ = chain()
    assert torch.allclose(linear.weight, torch.tensor([[0.0, -8 / 3, 4.0, 0.0]]))


def test_entering_is_the_weight_below_the_link() -> None:
    linear, (delta, mask, grid) = chain()
    assert entering(linear, delta).tolist() == [[1.0, -3.0, 3.0, 0.5]]
    assert entering(linear, mask).tolist() == [[1.0, -3.0, 4.0, 0.5]]
    assert entering(linear, grid).tolist() == [[0.0, -3.0, 4.0, 0.5]]
    assert not entering(linear, mask).requires_grad
    with pytest.raises(AssertionError):
        entering(linear, IntegerGrid(3, None))


def test_links() -> None:
    linear, stacked = chain()
    assert links(linear) == stacked
    assert links(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("upper", ["mask", "grid"])
def test_a_chain_out_of_order_is_refused(upper: str) -> None:
    linear = nn.Linear(4, 4)
    stack(linear, IntegerGrid(8, None))
    with pytest.raises(AssertionError, match="stacked on"):
        stack(
            linear,
            IntegerGrid(8, None) if upper == "grid" else Mask(linear.weight.shape, linear.weight.device),
        )


def test_methods_act_in_the_order_of_their_phases_not_of_the_list() -> None:
    given = [QAT(), Magnitude(), Full()]
    assert [stage.name for stage in ordered(given)] == ["full", "prune/magnitude", "quantize/qat"]
    assert Phase.SHAPE < Phase.TUNE < Phase.PRUNE < Phase.SHARE < Phase.QUANTIZE < Phase.OBJECTIVE
    assert [phase.name for phase in Phase if phase.acts_on_weights] == ["PRUNE", "SHARE", "QUANTIZE"]


def test_two_grids_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"quantize/int8 and quantize/qat: .* choose one"):
        refuse_conflicts([QAT(), Int8()])
    refuse_conflicts([Full(), Magnitude(), QAT()])


def test_fold_keeps_the_weight_and_hands_out_the_records() -> None:
    linear, _ = chain()
    values = torch.randn(5, 4)
    before = linear(values)
    records = fold({"it": linear, "bare": nn.Linear(2, 2)})
    assert torch.equal(linear(values), before)
    assert not parametrize.is_parametrized(linear)
    assert list(records) == ["it"]
    assert records["it"]["mask"].tolist() == [[False, True, True, True]]
    assert records["it"]["codes"].tolist() == [[0, -2, 3, 0]]
    assert torch.equal(records["it"]["codes"] * records["it"]["scale"], linear.weight)


def compressed(one: Any) -> Any:
    """LoRA with a delta that is not zero, half of the weights masked, the rest on 15 levels."""
    context = one.context()
    tuning = LoRA(rank=4)
    tuning.prepare(one.model, context)
    for name, parameter in one.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    tuning.link(one.model, context)
    Magnitude(sparsity=0.5).prepare(one.model, context)
    QAT(bits=4, activation_bits=None).prepare(one.model, context)
    return context


@pytest.mark.parametrize(("family", "task"), [("bert", "classification"), ("llama", "causal_lm")])
def test_delta_mask_and_grid_fold_and_unload_without_a_trace(
    setting: Callable[..., Any], family: str, task: str
) -> None:
    one = setting(family, task)
    names = set(dict(one.model.named_parameters()))
    plain = one.logits()
    context = compressed(one)
    trained = one.logits()
    assert not torch.equal(trained, plain)
    inside = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    fold(context.targets)
    assert float((one.logits() - trained).abs().max()) == 0.0
    unload(one.model)
    assert float((one.logits() - trained).abs().max()) == 0.0
    assert set(dict(one.model.named_parameters())) == names
    for name, linear in context.targets.items():
        assert one.model.get_submodule(name) is linear
        assert torch.equal(linear.weight, inside[name])
        assert int((linear.weight == 0).sum()) >= linear.weight.numel() // 2
        assert all(len(row.unique()) <= 15 for row in linear.weight)


def test_the_delta_is_masked_and_cannot_refill_what_was_pruned(setting: Callable[..., Any]) -> None:
    one = setting()
    context = compressed(one)
    with torch.no_grad():
        for _, layer in adapters(one.model):
            layer.lora_B["default"].weight.fill_(1.0)  # type: ignore[index, union-attr]
    for linear in context.targets.values():
        (mask,) = (link for link in links(linear) if isinstance(link, Mask))
        assert not linear.weight[~mask.mask].any()


def test_the_delta_is_added_in_full_precision_under_autocast(setting: Callable[..., Any]) -> None:
    one = setting()
    context = compressed(one)
    plain = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
        before = one.logits()
    fold(context.targets)
    for name, linear in context.targets.items():
        assert inside[name].dtype is torch.float32
        assert torch.equal(inside[name], plain[name])
        assert torch.equal(inside[name], linear.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(one.logits(), before)


def test_gradients_reach_both_factors_of_the_delta(setting: Callable[..., Any]) -> None:
    one = setting()
    compressed(one)
    one.task.loss(one.model(**one.task.inputs(one.batch())), one.batch()).backward()
    factors = {n: p for n, p in one.model.named_parameters() if "lora_" in n}
    assert len(factors) == 2 * 18
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in factors.values())


def test_tied_weights_are_never_targets(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    embedding = one.model.model.embed_tokens.weight
    assert one.model.lm_head.weight is embedding
    assert shared_parameters(one.model) == {id(embedding)}
    targets = Anatomy.of(one.model).linears()
    assert len(targets) == 3 * 7
    assert all(linear.weight is not embedding for linear in targets.values())
    before = embedding.detach().clone()
    compressed(one)
    assert torch.equal(embedding, before)


def test_blocks_that_share_a_weight_are_left_out(setting: Callable[..., Any]) -> None:
    one = setting()
    layers = one.model.bert.encoder.layer
    layers[0].intermediate.dense.weight = layers[1].intermediate.dense.weight
    names = set(Anatomy.of(one.model).linears())
    assert len(names) == 16
    assert not {f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)} & names


def test_replace_module_at_any_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    new = nn.Identity()
    replace_module(model, "0.0", new)
    replace_module(model, "1", new)
    assert model[0][0] is new
    assert model[1] is new
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_a_masked_negative_weight_is_a_plain_zero(setting: Callable[..., Any]) -> None:
    """-1 x 0 is -0.0, which a file without zeros would have to hold as a value."""
    one = setting()
    context = one.context()
    Magnitude().prepare(one.model, context)
    linear = next(iter(context.targets.values()))
    masked = linear.weight.detach()
    assert bool((torch.signbit(masked) & (masked == 0)).any())
    fold(context.targets)
    assert torch.equal(linear.weight, masked)
    assert not bool((torch.signbit(linear.weight) & (linear.weight == 0)).any())


@pytest.mark.parametrize("kind", [IntegerLinear, CodebookLinear, NormalFloatLinear])
def test_packed_linears_say_so_by_their_class(kind: type[nn.Module]) -> None:
    # and not by what an instance has: from Python 3.12 on that look-up does not see what torch keeps of a module
    assert issubclass(kind, Packed)
