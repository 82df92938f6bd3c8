"""Heads and neurons in every family: where they are, what is left when some are cut out, and that it can be rebuilt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki import artifact
from niwaki.edits import from_json
from niwaki.errors import ArtifactError
from niwaki.model.anatomy import Anatomy, adapt
from niwaki.model.cut_units import CutUnits, tell_config
from niwaki.model.tiny import FAMILIES
from niwaki.model.units import Units, cut, units_of

KINDS = ("heads", "neurons")
HEADS_TOLD = ("llama", "qwen2", "qwen3")  # whose config has a size of heads apart from their count


def wide(one: Any) -> Any:
    """Weights large enough that every head and every neuron shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return one


def staying(units: Units, index: int) -> list[int]:
    """Other units, and another number of them, in each sublayer."""
    return [u for u in range(units.count) if (u + index) % 3] or [0]


def plan(model: Any, kind: Any) -> dict[str, list[int]]:
    return {u.place: staying(u, i) for i, u in enumerate(units_of(Anatomy.of(model), kind))}


def masked(model: Any, kind: Any, kept: dict[str, list[int]]) -> None:
    """Close the others at the input of the linear that reads them."""
    for units in units_of(Anatomy.of(model), kind):
        columns = torch.ones(units.count, units.columns)
        columns[[u for u in range(units.count) if u not in kept[units.place]]] = 0
        model.get_submodule(units.output).weight.data *= columns.flatten()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_model_and_its_shrunk_twin_agree(setting: Callable[..., Any], family: str, kind: Any) -> None:
    one, twin = wide(setting(family)), wide(setting(family))
    whole, kept = one.logits(), plan(one.model, kind)
    CutUnits(kind=kind, kept=kept).apply(one.model)
    masked(twin.model, kind, kept)
    assert float((twin.logits() - whole).abs().max()) > 1e-3
    assert float((one.logits() - twin.logits()).abs().max()) < 1e-5
    assert sum(p.numel() for p in one.model.parameters()) < sum(p.numel() for p in twin.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_generation_with_a_cache_of_fewer_heads(setting: Callable[..., Any], family: str) -> None:
    one, twin = wide(setting(family, "causal_lm")), wide(setting(family, "causal_lm"))
    kept = plan(one.model, "heads")
    CutUnits(kind="heads", kept=kept).apply(one.model)
    masked(twin.model, "heads", kept)
    ids = one.batch()["input_ids"][:, :6]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(one.model.eval().generate(ids, **settings), twin.model.eval().generate(ids, **settings))


RELOAD = """
import json, sys, torch
from niwaki import artifact
torch.set_num_threads(1)
for folder in json.loads(sys.argv[1]):
    stored = torch.load(folder + "/../expected.pt", weights_only=True)
    with torch.inference_mode():
        logits = artifact.load(folder).model(**stored["inputs"]).logits
    assert torch.equal(logits, stored["logits"]), folder
    print("same")
"""


def test_every_family_is_rebuilt_by_a_fresh_process(setting: Callable[..., Any], tmp_path: Path) -> None:
    folders = []
    for family in FAMILIES:
        one = wide(setting(family))
        base, edits = one.model.config.to_dict(), adapt(one.model)
        for kind in KINDS:  # neurons are named by a number, so the first ones stay
            kept = {p: its if kind == "heads" else len(its) for p, its in plan(one.model, kind).items()}
            edits.append(CutUnits(kind=kind, kept=kept))
            edits[-1].apply(one.model)
        folder = tmp_path / family / "model"
        artifact.save(
            folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels, base_config=base,
            edits=edits,
        )  # fmt: skip
        torch.save({"inputs": one.task.inputs(one.batch()), "logits": one.logits()}, folder.parent / "expected.pt")
        folders.append(str(folder))
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, json.dumps(folders)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("same") == len(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_tells_the_truth_or_nothing(
    setting: Callable[..., Any], family: str, kind: Any, tmp_path: Path
) -> None:
    one = wide(setting(family))
    before = one.model.config.to_dict()
    anatomy = Anatomy.of(one.model)
    for units in units_of(anatomy, kind):
        CutUnits(kind=kind, kept={units.place: list(range(units.count // 2))}).apply(one.model)
    told = tell_config(anatomy, kind)
    assert told is (kind == "neurons" or family in HEADS_TOLD)
    assert told or one.model.config.to_dict() == before
    one.model.save_pretrained(tmp_path)
    if not told:
        with pytest.raises(RuntimeError, match="mismatched"):
            type(one.model).from_pretrained(tmp_path)
        return
    loaded = type(one.model).from_pretrained(tmp_path)
    adapt(loaded)
    assert torch.equal(one.logits(loaded), one.logits())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_layers_of_different_sizes_are_nothing_for_a_config(setting: Callable[..., Any], family: str) -> None:
    one = setting(family)
    before = one.model.config.to_dict()
    CutUnits(kind="neurons", kept={units_of(Anatomy.of(one.model), "neurons")[0].place: 5}).apply(one.model)
    assert not tell_config(Anatomy.of(one.model), "neurons")
    assert one.model.config.to_dict() == before


def test_a_head_count_that_transformers_refuses_is_not_told(setting: Callable[..., Any]) -> None:
    one = setting("llama", overrides={"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8})
    anatomy = Anatomy.of(one.model)
    CutUnits(kind="heads", kept={u.place: [0, 1, 2] for u in units_of(anatomy, "heads")}).apply(one.model)
    assert not tell_config(anatomy, "heads")  # 3 heads do not divide a width of 32
    one.model.config.validate()


def test_what_a_unit_owns_by_hand(setting: Callable[..., Any]) -> None:
    # Llama: 4 query heads of 8 in 2 groups. GPT-2: three segments of 32 rows. ModernBERT's Wi: two of the neurons.
    llama = units_of(Anatomy.of(setting("llama").model), "heads")[0]
    assert (llama.count, llama.columns, llama.size) == (2, 16, 8)
    assert llama.row_indices("model.layers.0.self_attn.q_proj", [1]) == list(range(16, 32))
    assert llama.row_indices("model.layers.0.self_attn.k_proj", [1]) == list(range(8, 16))
    assert llama.column_indices([1]) == list(range(16, 32))
    assert llama.query_heads([1]) == [2, 3]
    fused = units_of(Anatomy.of(setting("gpt2").model), "heads")[1]
    rows = [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert fused.row_indices("transformer.h.1.attn.c_attn", [1]) == rows
    gated = units_of(Anatomy.of(setting("modernbert").model), "neurons")[0]
    half = gated.count
    assert gated.row_indices("model.layers.0.mlp.Wi", [0, 5]) == [0, 5, half, half + 5]


@pytest.mark.parametrize(
    ("family", "heads", "neurons"),
    [("bert", 3, 3), ("albert", 1, 1), ("bart", 9, 6), ("t5", 9, 6), ("deberta-v2", 3, 3)],
)
def test_every_sublayer_counts_once(setting: Callable[..., Any], family: str, heads: int, neurons: int) -> None:
    anatomy = Anatomy.of(setting(family).model)
    assert [len(units_of(anatomy, kind)) for kind in KINDS] == [heads, neurons]
    assert {units.count for units in units_of(anatomy, "heads")} == {4}


@pytest.mark.parametrize(("family", "entry"), [("bert", "intermediate.dense"), ("llama", "mlp.up_proj")])
def test_neurons_go_as_torch_pruning_takes_them(setting: Callable[..., Any], family: str, entry: str) -> None:
    import torch_pruning

    ours, theirs = wide(setting(family)), wide(setting(family))
    units = units_of(Anatomy.of(ours.model), "neurons")[1]
    gone = [1, 4, 5, 40]
    cut(ours.model, units, [u for u in range(units.count) if u not in gone])
    inputs = theirs.task.inputs(theirs.batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(
            theirs.model, inputs, output_transform=lambda out: out.logits.sum()
        )
    linear = theirs.model.get_submodule(next(name for name in units.rows if name.endswith(entry)))
    graph.get_pruning_group(linear, torch_pruning.prune_linear_out_channels, idxs=gone).prune()
    state = theirs.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())


def test_a_second_cut_counts_from_the_first(setting: Callable[..., Any]) -> None:
    one, twin = wide(setting("t5")), wide(setting("t5"))
    places = [units.place for units in units_of(Anatomy.of(one.model), "heads")]
    first = {place: [0, 2, 3] if i % 2 else [1, 2, 3] for i, place in enumerate(places)}
    CutUnits(kind="heads", kept=first).apply(one.model)
    CutUnits(kind="heads", kept={place: [0, 2] for place in places}).apply(one.model)
    CutUnits(kind="heads", kept={place: [its[0], its[2]] for place, its in first.items()}).apply(twin.model)
    assert torch.equal(one.logits(), twin.logits())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "albert"])
def test_whole_sublayers_may_go(setting: Callable[..., Any], family: str, kind: Any) -> None:
    one, twin = wide(setting(family)), wide(setting(family))
    kept = plan(one.model, kind)
    for place in (next(iter(kept)), next(reversed(kept))):
        kept[place] = []
    CutUnits(kind=kind, kept=kept).apply(one.model)
    masked(twin.model, kind, kept)
    assert float((one.logits() - twin.logits()).abs().max()) < 1e-5
    anatomy = Anatomy.of(one.model)
    assert len(units_of(anatomy, kind)) == len(kept) - 2
    assert all(linear.weight.numel() for linear in anatomy.linears().values())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bart"])
def test_a_cache_counts_tokens_where_the_first_attention_is_gone(setting: Callable[..., Any], family: str) -> None:
    one = wide(setting(family, "causal_lm"))
    kept = plan(one.model, "heads")
    kept[next(iter(kept))] = []
    CutUnits(kind="heads", kept=kept).apply(one.model)
    ids = one.batch()["input_ids"][:, :8]
    with torch.inference_mode():
        whole = one.model.eval()(ids).logits
        first = one.model(ids[:, :5], use_cache=True)
        rest = one.model(ids[:, 5:], past_key_values=first.past_key_values).logits
    assert float((rest - whole[:, 5:]).abs().max()) < 1e-4


@pytest.mark.parametrize("kept", [{"nowhere": [0]}, {"*": [4]}, {"*": "all"}, {"*": -1}])
def test_an_edit_that_cannot_be(setting: Callable[..., Any], kept: dict[str, Any]) -> None:
    one = setting()
    place = units_of(Anatomy.of(one.model), "heads")[0].place
    with pytest.raises(ValueError, match=r"nowhere|has 4 heads"):
        CutUnits(kind="heads", kept={place if key == "*" else key: its for key, its in kept.items()}).apply(one.model)


def test_the_edit_is_plain_json_and_is_carried_unless_the_config_tells() -> None:
    edit = CutUnits(kind="heads", kept={"a": [0, 1]}, in_config=True)
    assert from_json(json.loads(json.dumps(edit.to_json()))) == edit
    assert not edit.carried
    assert CutUnits(kind="heads", kept={"a": [0, 1]}).carried
    with pytest.raises(ArtifactError):
        from_json({"edit": "niwaki.model.cut_units:CutUnits", "what": 1})
