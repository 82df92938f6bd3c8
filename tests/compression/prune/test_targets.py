"""Which linears are pruned, and how sparse each becomes: by expression, by part, from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.prune.sparsegpt import SparseGPT
from niwaki.compression.prune.wanda import Wanda
from niwaki.errors import ConfigError
from niwaki.model.tiny import FAMILIES
from niwaki.tuning.lora import LoRA
from niwaki.weights import links


def share(linear: Any) -> float:
    return float((linear.weight == 0).float().mean())


def pruned(setting: Callable[..., Any], stage: Any, family: str = "bert") -> dict[str, float]:
    """The share of zeros of each linear that has a mask."""
    one = setting(family)
    context = one.context()
    stage.check(context.anatomy, context.targets)
    stage.prepare(one.model, context)
    return {name: share(linear) for name, linear in context.targets.items() if links(linear)}


@pytest.mark.parametrize("stage", [Magnitude, Wanda, SparseGPT])
def test_an_expression_on_the_whole_name(setting: Callable[..., Any], stage: Any) -> None:
    found = pruned(setting, stage(targets=r".*\.layer\.1\.attention\.self\.(query|key)"))
    prefix = "bert.encoder.layer.1.attention.self."
    assert found == {f"{prefix}query": 0.5, f"{prefix}key": 0.5}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    expected = set(one.context().anatomy.part_names(["query", "feed_in"]))
    assert expected
    assert set(pruned(setting, Magnitude(targets=["query", "feed_in"]), family)) == expected


def test_parts_below_adapters(setting: Callable[..., Any]) -> None:
    one = setting()
    context = one.context()
    lora = LoRA()
    lora.prepare(one.model, context)
    lora.link(one.model, context)
    Magnitude(targets=["value"]).prepare(one.model, context)
    assert [name for name, linear in context.targets.items() if len(links(linear)) == 2] == [
        f"bert.encoder.layer.{i}.attention.self.value" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("query", r"targets='query': matches no linear of the blocks as a whole; the first is called bert\.encoder"),
        (["feed_gate"], r"targets=\['feed_gate'\]: this family of models has no feed_gate"),
    ],
)
def test_what_matches_nothing_is_refused_on_the_model(setting: Callable[..., Any], targets: Any, message: str) -> None:
    one = setting()
    with pytest.raises(ConfigError, match=message) as caught:
        Magnitude(targets=targets).check(one.context().anatomy, one.context().targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("(", "is no regular expression"),
        ([], "needs a regular expression, or some of query"),
        (["quer"], "some of query"),
    ],
)
def test_what_can_match_nothing_is_refused_at_once(targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Magnitude(targets=targets)


def write(folder: Path, content: Any) -> str:
    path = folder / "map.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize("stage", [Magnitude, Wanda, SparseGPT])
def test_a_map_gives_each_its_own(setting: Callable[..., Any], tmp_path: Path, stage: Any) -> None:
    entries = {QUERY: 0.75, r".*\.attention\..*": 0.25, r".*\.layer\.2\.(intermediate|output)\.dense": 0.0}
    path = write(tmp_path, {"sparsity": entries, "measured": {"by": "somebody"}})
    for name, zeros in pruned(setting, stage(sparsity_map=path, sparsity=0.5)).items():
        wanted = 0.75 if name == QUERY else 0.25 if ".attention." in name else 0.0 if ".layer.2." in name else 0.5
        assert zeros == pytest.approx(wanted, abs=1e-3), name


def test_a_map_of_every_name(setting: Callable[..., Any], tmp_path: Path) -> None:
    names = list(setting().context().targets)
    wanted = {name: (index % 4) / 4 for index, name in enumerate(names)}
    found = pruned(setting, Magnitude(sparsity_map=write(tmp_path, {"sparsity": wanted}), schedule="one_shot"))
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"), ({"sparsities": {}}, "needs {\"sparsity\""), ({"sparsity": {}}, "needs {\"sparsity\""),
        ([1], "needs {\"sparsity\""), ({"sparsity": {QUERY: 1.0}}, "query: 1.0: needs a number from 0 up, below 1"),
        ({"sparsity": {QUERY: "half"}}, "needs a number"), ({"sparsity": {QUERY: True}}, "needs a number"),
        ({"sparsity": {"(": 0.5}}, "is no regular expression"),
        ({"sparsity": {".*": 0.5, QUERY + "s": 0.5}}, "querys: matches none of the linears that are pruned"),
        ({"sparsity": {QUERY: 0.5}}, "no entry matches bert.encoder.layer.0.attention.self.key; add one, or"),
        ({"sparsity": {".*": 0.5, ".*key": 0.2}}, r"\.\* and \.\*key both match bert\.encoder\.layer\.0\.\S+key"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit(setting: Callable[..., Any], tmp_path: Path, content: Any, message: str) -> None:
    one = setting()
    stage = Magnitude(sparsity_map=write(tmp_path, content))
    with pytest.raises(ConfigError, match=message) as caught:
        stage.check(one.context().anatomy, one.context().targets)
    assert "\n" not in str(caught.value)
    assert "sparsity_map=" in str(caught.value)


def test_maps_that_have_no_effect(setting: Callable[..., Any], tmp_path: Path) -> None:
    path = write(tmp_path, {"sparsity": {".*": 0.5}})
    with pytest.raises(ConfigError, match="sparsity_map: has no effect with the pattern 2:4"):
        Magnitude(sparsity_map=path, pattern="2:4")
    with pytest.raises(ConfigError, match="scope=global: finds the sparsity of each linear itself"):
        Magnitude(sparsity_map=path, scope="global")
    one = setting()
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        Magnitude(sparsity_map=path + "x").check(one.context().anatomy, one.context().targets)
