"""SparseGPT against the paper's formulas: the inverse of what is left of the Hessian, computed anew for each column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki.compression.prune.mask import Mask, mask_targets
from niwaki.compression.prune.sparsegpt import SparseGPT
from niwaki.errors import ConfigError
from niwaki.stage import refuse_conflicts
from niwaki.tuning.dora import DoRA
from niwaki.tuning.lora import LoRA
from niwaki.weights import entering, fold, links


def by_hand(
    weight: Tensor, inputs: Tensor, sparsity: float, *, keep: int = 0, group: int = 0, columns: int = 128
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Optimal brain surgeon along the columns, in float64. Mask and weight."""
    weight, inputs = weight.double().clone(), inputs.double()
    rows, width = weight.shape
    hessian = 2 * inputs.T @ inputs
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]  # without the columns before j
    mask = torch.ones(rows, width, dtype=torch.bool)
    dropped_by_now = 0
    for j in range(width):
        stretch = range(j, min(j + (group or columns), width))
        if j % (group or columns) == 0:
            scores = torch.stack([weight[:, c] ** 2 / inverses[c][0, 0] for c in stretch], 1)
            if group:
                for i in range(rows):
                    for c in scores[i].argsort()[: group - keep].tolist():
                        mask[i, j + c] = False
            else:
                wanted = round(sparsity * rows * (j + len(stretch)))
                for flat in scores.flatten().argsort()[: wanted - dropped_by_now].tolist():
                    mask[flat // len(stretch), j + flat % len(stretch)] = False
                dropped_by_now = wanted
        for i in range(rows):
            if not mask[i, j]:
                weight[i, j:] = weight[i, j:] - weight[i, j] / inverses[j][0, 0] * inverses[j][0]
                weight[i, j] = 0.0
    return mask, weight


def correlated(count: int, width: int) -> Tensor:
    return torch.randn(count, width) @ (torch.eye(width) + 0.4 * torch.randn(width, width))


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"columns": 8}, {"columns": 8}), ({"sparsity": 0.3, "columns": 5}, {"columns": 5}), ({"sparsity": 0.7}, {}),
        ({"pattern": "2:4"}, {"keep": 2, "group": 4}), ({"pattern": "1:3", "columns": 7}, {"keep": 1, "group": 3}),
    ],
)  # fmt: skip
def test_masks_and_weights_are_those_of_the_paper(fields: dict[str, Any], arguments: dict[str, Any]) -> None:
    linear, inputs = nn.Linear(24, 10), correlated(60, 24)
    weight = linear.weight.detach().clone()
    mask = mask_targets({"it": linear}, Mask)[linear]
    stage = SparseGPT(**fields)
    statistic = stage.statistic(inputs[:20]) + stage.statistic(inputs[20:])
    with torch.no_grad():
        stage.prune(linear, mask, statistic, stage.final_sparsity)
    expected, updated = by_hand(weight, inputs, stage.final_sparsity, **arguments)
    assert torch.equal(mask.mask, expected)
    torch.testing.assert_close(linear.weight.double(), updated, rtol=1e-4, atol=1e-5)
    assert not torch.equal(linear.weight, weight * expected)  # something was made up for
    assert int((~mask.mask).sum()) == round(stage.final_sparsity * 240)
    # and the layer's output is nearer than with the same mask alone
    error = ((linear.weight - weight) @ inputs.T).norm()
    assert error < ((weight * expected - weight) @ inputs.T).norm()


def test_an_input_that_is_always_zero_is_no_obstacle() -> None:
    linear, inputs = nn.Linear(8, 4), torch.randn(20, 8)
    inputs[:, 3] = 0
    mask = mask_targets({"it": linear}, Mask)[linear]
    stage = SparseGPT()
    with torch.no_grad():
        stage.prune(linear, mask, stage.statistic(inputs), 0.5)
    assert torch.isfinite(linear.weight).all()
    assert not mask.mask[:, 3].any()
    assert int((~mask.mask).sum()) == 16


@pytest.mark.parametrize("tuning", ["none", "lora"])
def test_base_plus_delta_masked_is_the_result(setting: Callable[..., Any], tuning: str) -> None:
    """The link stays a plain mask; with a delta below it the base takes the update."""
    one, other = setting("llama", "causal_lm"), setting("llama", "causal_lm")
    context, plain = one.context(), other.context()
    if tuning == "lora":
        lora = LoRA(rank=2)
        lora.prepare(one.model, context)
        for name, parameter in one.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
        with torch.no_grad():
            lora.link(one.model, context)
            sums = [linear.weight.clone() for linear in context.targets.values()]
        for linear, total in zip(plain.targets.values(), sums, strict=True):
            linear.weight.data.copy_(total)
    SparseGPT().prepare(one.model, context)
    SparseGPT().prepare(other.model, plain)
    for mine, theirs in zip(context.targets.values(), plain.targets.values(), strict=True):
        assert type(links(mine)[-1]) is Mask
        assert torch.equal(links(mine)[-1].mask, links(theirs)[-1].mask)  # type: ignore[arg-type]
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    stacked = one.logits()
    fold(context.targets)
    assert torch.equal(one.logits(), stacked)


def test_each_block_is_calibrated_on_what_the_pruned_ones_give(setting: Callable[..., Any]) -> None:
    one, dense = setting(), setting()
    context, plain = one.context(), dense.context()
    for linear in [*context.targets.values(), *plain.targets.values()]:
        linear.weight.data *= 15  # as random as it starts, a block hardly changes what passes through it
    SparseGPT(sparsity=0.6).prepare(one.model, context)
    last = next(name for name in context.targets if ".layer.2." in name and name.endswith("query"))
    inputs: dict[str, Tensor] = {}
    for side, targets, model in (("pruned", context.targets, one), ("dense", plain.targets, dense)):
        handle = targets[last].register_forward_hook(lambda m, i, o, side=side: inputs.update({side: i[0]}))
        model.logits()
        handle.remove()
    real = one.task.inputs(one.batch())["attention_mask"].bool()
    weight = plain.targets[last].weight.detach()
    mask, updated = by_hand(weight, inputs["pruned"][real], 0.6)
    assert torch.equal(links(context.targets[last])[0].mask, mask)  # type: ignore[arg-type]
    torch.testing.assert_close(context.targets[last].weight.double(), updated, rtol=1e-3, atol=1e-4)
    assert not torch.equal(mask, by_hand(weight, inputs["dense"][real], 0.6)[0])


def test_what_enters_the_mask_is_left_alone_where_it_drops(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    dense = {name: linear.weight.detach().clone() for name, linear in context.targets.items()}
    SparseGPT().prepare(one.model, context)
    for name, linear in context.targets.items():
        mask = links(linear)[0]
        away = ~mask.mask  # type: ignore[operator]
        assert torch.equal(entering(linear, mask)[away], dense[name][away])


def test_a_tuning_that_is_no_sum_is_refused() -> None:
    refuse_conflicts([LoRA(), SparseGPT()])
    with pytest.raises(ConfigError, match=r"tuning=dora and prune/sparsegpt: the base weight changes.*use tuning=lora"):
        refuse_conflicts([DoRA(), SparseGPT()])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"pattern": "4x4"}, "pattern=4x4"), ({"damping": 0.0}, "damping=0.0"), ({"columns": 0}, "columns=0"),
        ({"columns": 3, "pattern": "2:4"}, "columns=3"), ({"rows": 0}, "rows=0"),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.sparsegpt\.{name}") as caught:
        SparseGPT(**fields)
    assert "\n" not in str(caught.value)
