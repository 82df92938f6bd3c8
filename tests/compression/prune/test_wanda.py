"""Wanda against its formula in plain loops, and block after block on models of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from niwaki.compression.calibration import after_last_use, tokens
from niwaki.compression.prune.mask import Mask, mask_targets
from niwaki.compression.prune.wanda import Wanda
from niwaki.compression.quantize.qat import QAT
from niwaki.compression.share.layers import Layers
from niwaki.errors import ConfigError
from niwaki.model.tiny import FAMILIES
from niwaki.stage import refuse_conflicts
from niwaki.tuning.full import Full
from niwaki.weights import links


def by_loops(weight: Tensor, inputs: Tensor, sparsity: float, keep: int = 0, group: int = 0) -> Tensor:
    """The mask of the paper: |w_ij| times the norm of input j, the lowest of every row (or group of a row) go."""
    rows, columns = weight.shape
    norms = [sum(float(x) ** 2 for x in inputs[:, j].double()) ** 0.5 for j in range(columns)]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for i in range(rows):
        scores = [abs(float(weight[i, j])) * norms[j] for j in range(columns)]
        parts = [range(g, g + group) for g in range(0, columns, group)] if group else [range(columns)]
        for part in parts:
            count = group - keep if group else round(sparsity * columns)
            for j in sorted(part, key=lambda j: scores[j])[:count]:
                mask[i, j] = False
    return mask


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [({}, (0.5,)), ({"sparsity": 0.7}, (0.7,)), ({"pattern": "2:4"}, (0.5, 2, 4)), ({"pattern": "1:4"}, (0.75, 1, 4))],
)
def test_masks_are_those_of_the_formula(fields: dict[str, Any], arguments: tuple[Any, ...]) -> None:
    linear, inputs = nn.Linear(24, 10), torch.randn(50, 24) * torch.rand(24) * 3
    weight = linear.weight.detach().clone()
    mask = mask_targets({"it": linear}, Mask)[linear]
    stage = Wanda(**fields)
    # in two parts, as batches come
    statistic = stage.statistic(inputs[:20]) + stage.statistic(inputs[20:])
    stage.prune(linear, mask, statistic, stage.final_sparsity)
    expected = by_loops(weight, inputs, *arguments)
    assert torch.equal(mask.mask, expected)
    assert torch.equal(linear.weight, weight * expected)
    assert not torch.equal(expected, by_loops(weight, torch.ones(1, 24), *arguments))  # inputs matter


def test_scope_layer_compares_all_rows() -> None:
    linear, inputs = nn.Linear(8, 4), torch.randn(9, 8)
    linear.weight.data[0] *= 100
    weight = linear.weight.detach().clone()
    mask = mask_targets({"it": linear}, Mask)[linear]
    stage = Wanda(scope="layer")
    stage.prune(linear, mask, stage.statistic(inputs), 0.5)
    scores = weight.abs() * inputs.norm(dim=0)
    assert torch.equal(mask.mask, scores > scores.flatten().sort().values[15])
    assert mask.mask[0].all()
    assert [Wanda(pattern=p).compared for p in ("unstructured", "2:4", "1x4", "4x1")] == ["row", "layer"] * 2


@pytest.mark.parametrize(
    ("family", "shared"), [*((family, None) for family in FAMILIES), ("bert", [[0, 2]]), ("llama", [[0, 2], [1, 3]])]
)  # fmt: skip
def test_later_blocks_see_what_pruned_blocks_give(
    setting: Callable[..., Any], family: str, shared: list[list[int]] | None
) -> None:
    overrides = {"num_hidden_layers": 4} if shared else {}
    one, other = (setting(family, overrides=overrides) for _ in range(2))
    for each in (one, other):
        if shared:
            Layers(lists=shared).prepare(each.model, each.context())
    context = one.context()
    Wanda(sparsity=0.6).prepare(one.model, context)
    # the same by hand on the other model: whole forward passes, one block at a time
    named = dict(other.context().targets)
    batch = other.task.inputs(other.batch())
    for place, _, _ in other.context().anatomy.named_blocks():
        seen: dict[str, list[Tensor]] = {name: [] for name in named if name.startswith(f"{place}.")}
        handles = [
            named[name].register_forward_hook(lambda m, i, o, into=seen[name]: into.append(i[0])) for name in seen
        ]
        with torch.no_grad():
            other.model.eval()(**batch)
        for handle in handles:
            handle.remove()
        for name, inputs in seen.items():
            real = torch.cat([tokens(values, batch["attention_mask"]) for values in inputs])
            weight = named[name].weight.data
            weight *= by_loops(weight, real, 0.6)
    for name, linear in context.targets.items():
        assert torch.equal(linear.weight, named[name].weight), name


def test_a_block_has_been_seen_after_its_last_use() -> None:
    a, b, c = (nn.Identity() for _ in range(3))
    assert after_last_use(a, [a, b, c]) is b
    assert after_last_use(a, [a, b, a, c]) is c
    assert after_last_use(b, [a, b, a, c]) is c
    assert after_last_use(a, [a, b, a, b]) is None  # b has been there, so the pass goes on to its end
    assert after_last_use(a, [b]) is None


def test_padding_does_not_count() -> None:
    values, mask = torch.arange(24.0).view(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert tokens(values, mask).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [12, 13, 14, 15]]
    assert len(tokens(values, None)) == 6
    assert len(tokens(values[:1], mask)) == 3  # a table of positions
    assert tokens(values, mask[:, 1:]).tolist()[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # one virtual token each
    assert len(tokens(values.view(6, 4), mask)) == 6


def test_more_padding_changes_no_mask(setting: Callable[..., Any]) -> None:
    masks = []
    for extra in (0, 7):
        one = setting()
        context = one.context()
        batch = one.batch()
        padded = {n: nn.functional.pad(v, (0, extra)) if v.ndim == 2 else v for n, v in batch.items()}
        context.calibration = lambda count, padded=padded: [padded]
        Wanda().prepare(one.model, context)
        masks.append([links(linear)[0].mask for linear in context.targets.values()])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_rows_are_asked_for_and_the_mode_stays(setting: Callable[..., Any]) -> None:
    one = setting()
    context, asked = one.context(), []
    whole = context.calibration
    context.calibration = lambda count: (asked.append(count), whole(count))[1]
    one.model.train()
    Wanda(rows=3).prepare(one.model, context)
    assert asked == [3]
    assert one.model.training
    assert not any(linear._forward_pre_hooks for linear in context.targets.values())


def test_acts_before_or_after_the_fit() -> None:
    assert Wanda().during_fit
    assert not Wanda(when="after_fit").during_fit
    refuse_conflicts([Full(), Wanda(), QAT()])
    with pytest.raises(ConfigError, match=r"prune/wanda after the fit and quantize/qat: .*when=before_fit"):
        refuse_conflicts([Full(), Wanda(when="after_fit"), QAT()])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 0}, r"wanda\.rows=0: needs a whole number of at least 1"),
        ({"when": "during"}, r"wanda\.when='during'"),
        ({"scope": "global"}, r"wanda\.scope='global': needs row or layer"),
        ({"scope": "row", "pattern": "2:4"}, r"wanda\.scope=row: has no effect"),
        ({"scope": "row", "pattern": "4x4"}, r"wanda\.scope=row: a block of the pattern 4x4 lies in 4 rows"),
        ({"sparsity": 1.0}, r"wanda\.sparsity=1.0"),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.{message}") as caught:
        Wanda(**fields)
    assert "\n" not in str(caught.value)
