"""Blocks, rows and several layers at once, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.mask import Mask, mask_targets
from niwaki.compression.prune.pattern import Pattern, Selection
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification


def test_blocks_by_hand() -> None:
    scores = torch.tensor([[9.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 0, 0], [2, 2, 0, 5]])
    # means of the 2 x 2 blocks: 2.25 1 / 2 1.25
    assert Pattern.parse("2x2").pool(scores).tolist() == [[2.25, 1.0], [2.0, 1.25]]
    assert Pattern.parse("2x2").draw(scores, 0.5).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 0],
    ]
    assert Pattern.parse("2x2").draw(scores, 0.75).int().sum() == 4
    # 4 outputs x 1 input: sums 13, 4, 2, 7
    assert Pattern.parse("4x1").draw(scores, 0.5).int().tolist() == [[1, 0, 0, 1]] * 4
    # 1 x 2, in each row apart
    assert Pattern.parse("1x2").draw(scores, 0.5, by_row=True).int().tolist() == [
        [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1],
    ]  # fmt: skip


def test_rows_by_hand() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4], [40, 30, 20, 10]])
    assert Pattern().draw(scores, 0.5).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert Pattern().draw(scores, 0.5, by_row=True).int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert Pattern().draw(scores, 0.25, by_row=True).int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]


def test_blocks_of_several_layers_together() -> None:
    small, large = nn.Linear(2, 2, bias=False), nn.Linear(4, 2, bias=False)
    masks = mask_targets({"small": small, "large": large}, Mask)
    selection = Selection(Pattern.parse("2x2"), "global", dict.fromkeys(masks.values(), 2 / 3))
    scores = {masks[small]: torch.full((2, 2), 3.0), masks[large]: torch.tensor([[1.0, 1, 9, 0], [1, 1, 0, 0]])}
    selection.draw(scores)
    assert masks[small].mask.all()
    assert not masks[large].mask.any()


def test_each_mask_has_its_own_sparsity() -> None:
    linears = {name: nn.Linear(4, 2, bias=False) for name in "ab"}
    masks = mask_targets(linears, Mask)
    first, second = masks.values()
    selection = Selection(Pattern(), "layer", {first: 0.25, second: 0.75})
    scores = {mask: torch.rand(2, 4) for mask in (first, second)}
    selection.draw(scores)
    assert [int((~m.mask).sum()) for m in (first, second)] == [2, 6]
    selection.draw(scores, 0.5)
    assert [int((~m.mask).sum()) for m in (first, second)] == [1, 3]


@pytest.mark.parametrize("text", ["1x1", "0x4", "4x", "x4", "4x4x4", "-2x2", "block"])
def test_what_is_no_block(text: str) -> None:
    with pytest.raises(ConfigError, match=r"needs unstructured, or N:M.*or a block of outputs x inputs, such as 4x4"):
        Pattern.parse(text)


def test_blocks_that_do_not_fit_are_refused_on_the_empty_model() -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=r"magnitude\.pattern=5x2: bert\.\S+ has 32 outputs, which 5 does not divide"):
        Magnitude(pattern="5x2").check(anatomy, anatomy.linears())
    with pytest.raises(ConfigError, match=r"magnitude\.pattern=2x5: bert\.\S+ has 32 inputs, which 5 does not divide"):
        Magnitude(pattern="2x5").check(anatomy, anatomy.linears())
    Magnitude(pattern="8x4").check(anatomy, anatomy.linears())
    with pytest.raises(ConfigError, match=r"scope=row: a block of the pattern 4x4 lies in 4 rows"):
        Magnitude(pattern="4x4", scope="row")
    with pytest.raises(ConfigError, match=r"scope=row: has no effect with the pattern 2:4"):
        Magnitude(pattern="2:4", scope="row")
