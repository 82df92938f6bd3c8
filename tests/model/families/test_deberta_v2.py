"""DeBERTa: projections of relative positions, where they are not those of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from niwaki.model.anatomy import Anatomy


def test_projections_of_positions_are_linears_of_the_block(setting: Callable[..., Any]) -> None:
    anatomy = Anatomy.of(setting("deberta-v2", overrides={"share_att_key": False}).model)
    inside = {id(m) for block in anatomy.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    found = anatomy.linears()
    assert {id(linear) for linear in found.values()} == inside
    assert len(found) == 3 * 8
    assert len(anatomy.part_names(["key"])) == len(anatomy.part_names(["query"])) == 6


def test_only_absolute_positions_have_an_end(setting: Callable[..., Any]) -> None:
    assert Anatomy.of(setting("deberta-v2").model).positions is None
    assert Anatomy.of(setting("deberta-v2", overrides={"position_biased_input": True}).model).positions == 512
