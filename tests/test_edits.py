"""Edits: written as JSON, read back as the same edit, and nothing else read."""

from __future__ import annotations

import json

import pytest

from niwaki.compression.quantize.integers import UseIntegers
from niwaki.edits import Edit, from_json
from niwaki.errors import ArtifactError
from niwaki.model.load import KeepBlocks
from niwaki.tuning.bottleneck import AddBottlenecks

EDITS = [
    KeepBlocks(blocks=[0, 2]),
    UseIntegers(modules=["a.b"], bits=4, group=None, activation_bits=8),
    AddBottlenecks(adapter="a", parts=["output"], reads="input", size=4, activation="relu", scale=4.0, dropout=0.1),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: type(edit).__name__)
def test_round_trip_through_json(edit: Edit) -> None:
    assert from_json(json.loads(json.dumps(edit.to_json()))) == edit


def test_the_record_names_module_and_class() -> None:
    assert EDITS[0].to_json() == {"edit": "niwaki.model.load:KeepBlocks", "blocks": [0, 2]}


@pytest.mark.parametrize(
    "record",
    [
        {"edit": "os:system", "command": "true"},
        {"edit": "niwaki.model.load:Pretrained", "name": "x"},
        {"edit": "niwaki.artifact:load", "folder": "x"},
        {"edit": "niwaki.model.load:KeepBlocks", "layers": [0]},
        {"edit": "niwaki.model.load:KeepBlocks"},
        {"edit": "niwaki.edits:Edit"},
        {"edit": None},
        {},
        [],
        "KeepBlocks",
        None,
        7,
    ],
)
def test_anything_else_is_one_line(record: object) -> None:
    with pytest.raises(ArtifactError) as caught:
        from_json(record)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("niwaki.json: edits: ")
