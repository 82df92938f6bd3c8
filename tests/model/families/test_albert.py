"""ALBERT: blocks that all layers share are listed once, and none can be left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification


def test_shared_blocks_are_listed_once_and_run_in_every_layer(setting: Callable[..., Any]) -> None:
    one = setting("albert")
    anatomy = Anatomy.of(one.model)
    runs: list[Any] = []
    linear = next(iter(anatomy.linears().values()))
    linear.register_forward_hook(lambda *_: runs.append(1))
    one.logits()
    assert len(anatomy.linears()) == 6
    assert len(runs) == one.model.config.num_hidden_layers == 3


def test_groups_of_several_blocks(setting: Callable[..., Any]) -> None:
    one = setting("albert", overrides={"num_hidden_groups": 3, "inner_group_num": 2})
    anatomy = Anatomy.of(one.model)
    inside = {
        id(m)
        for b in one.model.albert.encoder.albert_layer_groups.modules()
        for m in b.modules()
        if isinstance(m, nn.Linear)
    }
    assert len(anatomy.blocks) == 6
    assert {id(linear) for linear in anatomy.linears().values()} == inside
    assert all(one.model.get_submodule(name) is linear for name, linear in anatomy.linears().items())
    assert torch.isfinite(one.logits()).all()


def test_layers_are_not_left_out() -> None:
    with pytest.raises(ConfigError, match=r"^model\.layers=\[0\]: all layers of an albert share their blocks, so none"):
        Tiny(name="albert", layers=[0]).empty(Classification(), ("a", "b"))
