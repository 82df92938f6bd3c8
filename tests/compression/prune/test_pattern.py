"""Blocks, rows and several layers at once, worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.mask import Mask, mask_targets
from niwaki.compression.prune.movement import Movement
from niwaki.compression.prune.pattern import Pattern, Selection
from niwaki.compression.prune.wanda import Wanda
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


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (Magnitude(sparsity=0.9999), r"sparsity=0\.9999: 0\.9999 of the 1024 weights of bert\.\S+ is all of them"),
        (Magnitude(sparsity=0.0001, schedule="cubic"), r"of the 1024 weights of bert\.\S+ is none of them"),
        (Magnitude(sparsity=0.99, scope="row"), r"of the 32 weights of each row of bert\.\S+ is all of them"),
        (Wanda(sparsity=0.99), r"of the 32 weights of each row of bert\.\S+ is all of them"),
        (Wanda(sparsity=0.95, pattern="16x16"), r"0\.95 of the 4 16x16 blocks of bert\.\S+ is all of them"),
        (Movement(sparsity=0.01, pattern="1x8", scope="row"), r"the 4 1x8 blocks of each row of bert\.\S+ is none of"),
    ],
)
def test_a_sparsity_that_leaves_or_drops_nothing_is_refused_on_the_empty_model(stage: Any, says: str) -> None:
    anatomy = Anatomy.of(Tiny().empty(Classification(), ("a", "b")))
    with pytest.raises(ConfigError, match=rf"^{stage.field}\..*{says}") as caught:
        stage.check(anatomy, anatomy.linears())
    assert "\n" not in str(caught.value)
    for fits in (Magnitude(sparsity=0.9999, scope="global"), Wanda(sparsity=0.95), Magnitude(pattern="1:16")):
        fits.check(anatomy, anatomy.linears())


def test_a_map_may_leave_a_linear_whole_but_not_empty(tmp_path: Path) -> None:
    anatomy, path = Anatomy.of(Tiny().empty(Classification(), ("a", "b"))), tmp_path / "map.json"
    path.write_text('{"sparsity": {".*query": 0, ".*key": 0.9999}}')
    with pytest.raises(ConfigError, match=r"sparsity_map='\S+': 0\.9999 of the 1024 weights of bert\.\S+key is all of"):
        Magnitude(sparsity=0.5, sparsity_map=str(path)).check(anatomy, anatomy.linears())
    path.write_text('{"sparsity": {".*query": 0}}')
    Magnitude(sparsity=0.5, sparsity_map=str(path)).check(anatomy, anatomy.linears())


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
