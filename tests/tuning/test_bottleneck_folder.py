"""Adapters by name beside one base: what a folder holds, off is exactly the base, several at once, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from niwaki import artifact
from niwaki.compression.quantize.int8 import Int8
from niwaki.errors import ArtifactError, ConfigError, UserError
from niwaki.tuning import bottleneck_folder as folders
from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.adapter_parallel import Parallel
from niwaki.tuning.adapter_pfeiffer import Pfeiffer
from niwaki.tuning.bottleneck import bottlenecks, edits_of
from niwaki.weights import fold

TUNINGS = [
    Houlsby(size=8), Houlsby(size=8, norms=False), Pfeiffer(size=8, norms=True), Parallel(size=8),
    Parallel(size=8, beside="attention"),
]  # fmt: skip
KINDS = [("bert", "classification"), ("bert", "ner"), ("llama", "classification"), ("llama", "causal_lm")]
every_kind = pytest.mark.parametrize(("family", "task"), KINDS)
every_tuning = pytest.mark.parametrize("tuning", TUNINGS, ids=lambda t: f"{t.name}-{t.parts[0]}-{t.norms}")


@pytest.fixture
def learned(setting: Callable[..., Any], grown: Any, train: Any) -> Callable[..., Any]:
    """`learned(family, task, tuning, steps)`: a model that learned with an adapter; head and norms moved too."""

    def make(family: str = "bert", task: str = "classification", tuning: Any = TUNINGS[0], steps: int = 3) -> Any:
        one = setting(family, task)
        grown(one, tuning, random=True)
        train(one.learner(steps=steps), [one.batch()] * steps)
        return one

    return make


@every_tuning
@every_kind
def test_a_folder_holds_the_adapter_alone_and_makes_the_same_model(
    setting: Callable[..., Any], learned: Any, tmp_path: Path, tuning: Any, family: str, task: str
) -> None:
    one = learned(family, task, tuning)
    learning = {n: p for n, p in one.model.named_parameters() if p.requires_grad}
    folders.save_adapter(one.model, tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(stored) == {name.replace(".adapter.default.", ".adapter.") for name in learning}
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in learning.values())
    base = setting(family, task)
    edit = folders.load_adapter(base.model, tmp_path / "a", "other_name")
    assert edit.adapter == "other_name"
    assert torch.equal(base.logits(), one.logits())
    assert (folders.names(base.model), folders.active(base.model)) == (("other_name",), ("other_name",))


@every_tuning
@every_kind
def test_off_is_exactly_the_base_and_on_again_what_it_was(
    setting: Callable[..., Any], learned: Any, tmp_path: Path, tuning: Any, family: str, task: str
) -> None:
    one, base = learned(family, task, tuning), setting(family, task)
    expected = one.logits()
    assert not torch.equal(expected, base.logits())
    for _ in range(2):
        folders.disable(one.model)
        assert torch.equal(one.logits(), base.logits())
        assert folders.active(one.model) == ()
        folders.disable(one.model)  # a second time is nothing new
        folders.enable(one.model)
        assert torch.equal(one.logits(), expected)
    with folders.disabled(one.model):
        assert torch.equal(one.logits(), base.logits())
    assert torch.equal(one.logits(), expected)


@every_kind
def test_several_on_one_base_each_as_it_was_alone(
    setting: Callable[..., Any], learned: Any, tmp_path: Path, family: str, task: str
) -> None:
    base = setting(family, task)
    plain, alone = base.logits(), {}
    for number, tuning in enumerate(TUNINGS):
        one = learned(family, task, tuning, steps=number + 1)
        alone[f"a{number}"] = one.logits()
        folders.save_adapter(one.model, tmp_path / f"a{number}")
    for name in alone:
        folders.load_adapter(base.model, tmp_path / name, name)
        assert torch.equal(base.logits(), alone[name])
    assert folders.names(base.model) == tuple(alone)
    for name in [*reversed(alone), *alone]:
        folders.activate(base.model, name)
        assert torch.equal(base.logits(), alone[name])
        folders.disable(base.model)
        assert torch.equal(base.logits(), plain)
    folders.save_adapter(base.model, tmp_path / "again", "a2")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("a2", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_two_at_once_act_in_the_order_given(
    setting: Callable[..., Any], learned: Any, tmp_path: Path, bottleneck_by_hand: Any
) -> None:
    for name, tuning in (("serial", Houlsby(size=4)), ("third", Houlsby(size=6)), ("beside", Parallel(size=4))):
        folders.save_adapter(learned(tuning=tuning).model, tmp_path / name)
    base = setting()
    for name in ("serial", "third", "beside"):
        folders.load_adapter(base.model, tmp_path / name, name)
    layer = base.model.bert.encoder.layer[1]
    end, z, hidden = layer.output.dense, torch.randn(2, 5, 32), torch.randn(2, 5, 64)
    gelu, relu = torch.nn.functional.gelu, torch.nn.functional.relu
    orders = [("serial", "third"), ("third", "serial"), ("beside", "serial"), ("serial", "beside")]
    with torch.no_grad():
        for order in orders:
            folders.activate(base.model, *order)
            layer.intermediate.dense(z)
            y = end.linear(hidden)
            for name in order:
                inside = end.adapter[name]
                y = y + (
                    4.0 * bottleneck_by_hand(inside, z, relu)
                    if name == "beside"
                    else bottleneck_by_hand(inside, y, gelu)
                )
            assert torch.allclose(end(hidden), y, atol=1e-5)
            head = load_file(tmp_path / order[-1] / "adapter_model.safetensors")["classifier.weight"]
            assert torch.equal(base.model.classifier.weight, head)


def test_learning_goes_on_after_off_and_on(setting: Callable[..., Any], learned: Any, train: Any) -> None:
    one, twin = learned(), learned()
    with folders.disabled(one.model):
        pass
    for model in (one, twin):
        train(model.learner(steps=2), [model.batch()] * 2)
    assert torch.equal(one.logits(), twin.logits())
    folders.disable(one.model)
    assert torch.equal(one.logits(), setting().logits())


FRESH = """
import sys, torch
from pathlib import Path
from niwaki.model.tiny import Tiny
from niwaki.task.classification import Classification
from niwaki.tuning import bottleneck_folder as folders
torch.set_num_threads(1)
model = Tiny(name="bert", dropout=0.0).load(Classification(), ("maybe", "no", "yes"), 0)
expected = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
folders.load_adapter(model, Path(sys.argv[1]) / "a", "mine")
with torch.no_grad():
    assert torch.equal(model.eval()(**expected["inputs"]).logits, expected["on"])
    folders.disable(model)
    assert torch.equal(model(**expected["inputs"]).logits, expected["off"])
"""


def test_in_a_fresh_process(setting: Callable[..., Any], learned: Any, tmp_path: Path) -> None:
    one = learned()
    folders.save_adapter(one.model, tmp_path / "a")
    inputs = one.task.inputs(one.batch())
    torch.save({"inputs": inputs, "on": one.logits(), "off": setting().logits()}, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_on_an_artifact_as_base(setting: Callable[..., Any], grown: Any, learned: Any, tmp_path: Path) -> None:
    """What an artifact was saved with belongs to it: off is the artifact, not the model before it."""
    one = setting()
    base_config = one.model.config.to_dict()
    context = grown(one, Houlsby(size=8), random=True)
    edits: list[Any] = list(edits_of(one.model).values())
    stage = Int8()
    stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    edits += stage.finalize(one.model, context)
    with pytest.raises(ConfigError, match=r"holds integers"):
        folders.save_adapter(one.model, tmp_path / "no")
    assert not (tmp_path / "no" / folders.CONFIG).exists()
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits,
    )  # fmt: skip
    saved = artifact.load(tmp_path / "model").model
    with pytest.raises(ConfigError, match=r"^adapter: there is none to put off; default came with the model"):
        folders.disable(saved)
    folders.save_adapter(learned(tuning=Parallel(size=4)).model, tmp_path / "a")
    folders.load_adapter(saved, tmp_path / "a", "more")
    assert not torch.equal(one.logits(saved), one.logits())
    folders.disable(saved)
    assert torch.equal(one.logits(saved), one.logits())


@pytest.fixture
def folder(learned: Any, tmp_path: Path) -> Path:
    folders.save_adapter(learned().model, tmp_path / "a")
    return tmp_path / "a"


def refused(one: Any, folder: Path, *words: str, name: str = "mine") -> None:
    """Loading says so in one line, and leaves the model as it was."""
    before, keys = one.logits(), list(one.model.state_dict())
    with pytest.raises(UserError) as caught:
        folders.load_adapter(one.model, folder, name)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(one.model.state_dict()) == keys
    assert torch.equal(one.logits(), before)


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_no_adapter_or_one_of_another_kind(setting: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    assert folders.is_adapter(folder)
    refused(setting(), tmp_path / "nowhere", "needs a folder with an adapter_config.json")
    change(folder, peft_type="LORA")
    assert not folders.is_adapter(folder)
    refused(setting(), folder, "BOTTLENECK")
    (folder / "adapter_config.json").write_text("[")
    assert not folders.is_adapter(folder)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {}, ["another model_type", "llama"]),
        ("bert", {"overrides": {"num_hidden_layers": 2}}, ["another blocks", "has 2"]),
        ("bert", {"overrides": {"hidden_size": 64}}, ["another width", "has 64"]),
        ("bert", {"task": "ner"}, ["bert.pooler.dense", "none in the model"]),
        ("bert", {"labels": 2}, ["classifier", "[3", "[2"]),
    ],
)
def test_another_base(
    setting: Callable[..., Any], folder: Path, family: str, fields: dict[str, Any], words: list[str]
) -> None:
    fields = dict(fields)
    labels = fields.pop("labels", None)
    one = setting(family, **fields)
    if labels:
        one.model.classifier = torch.nn.Linear(32, labels)
    refused(one, folder, *words)


def test_a_damaged_folder(setting: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    stored = load_file(weights)
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    gone = next(name for name in stored if name.endswith("up.bias"))
    save_file({n: t for n, t in stored.items() if n != gone}, lacking / weights.name)
    refused(setting(), lacking, gone, "none in the file")
    save_file({n: t for n, t in stored.items() if n != "classifier.bias"}, lacking / weights.name)
    refused(setting(), lacking, "classifier.bias", "none in the file")
    save_file(stored | {"bert.nothing": torch.zeros(1)}, lacking / weights.name)
    refused(setting(), lacking, "bert.nothing", "none in the model")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    change(other, size=4)
    refused(setting(), other, "down.bias", "[8]", "[4]")
    for fields in (
        {"size": 0},
        {"activation": "exp"},
        {"reads": "all"},
        {"more": 1},
        {"scale": "4"},
        {"dropout": 1},
        {"parts": [[]]},
        {"beside": None},
    ):
        broken = Path(shutil.copytree(folder, tmp_path / f"broken{len(str(fields))}{next(iter(fields))}"))
        change(broken, **fields)
        refused(setting(), broken, "adapter_config.json is damaged")
    weights.write_bytes(weights.read_bytes()[:40])
    refused(setting(), folder, "adapter_model.safetensors cannot be read")
    weights.unlink()
    refused(setting(), folder, "adapter_model.safetensors cannot be read")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "a b", "../x"])
def test_names_that_cannot_be(setting: Callable[..., Any], folder: Path, name: str) -> None:
    refused(setting(), folder, f"adapter={name!r}: needs letters", name=name)


def test_a_name_that_is_taken(setting: Callable[..., Any], folder: Path) -> None:
    one = setting()
    folders.load_adapter(one.model, folder, "mine")
    refused(one, folder, "adapter='mine': the model has one of that name")
    assert folders.active(one.model) == ("mine",)


def test_names_that_are_not_there(setting: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    one = setting()
    with pytest.raises(ConfigError, match="there is none to put off"):
        folders.disable(one.model)
    folders.load_adapter(one.model, folder, "mine")
    for wrong in (("yours",), ("mine", "mine")):
        with pytest.raises(ConfigError, match=r"each once; it has mine$"):
            folders.activate(one.model, *wrong)
    with pytest.raises(ConfigError, match=r"adapter='yours': needs one adapter of this model; it has mine"):
        folders.save_adapter(one.model, tmp_path / "b", "yours")
    folders.disable(one.model)
    with pytest.raises(ConfigError, match=r"adapter=None: needs one adapter"):
        folders.save_adapter(one.model, tmp_path / "b")
    assert len(bottlenecks(one.model, "mine")) == 6


def test_an_odd_adapter_leaves_the_active_one_on(setting: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    one = setting()
    folders.load_adapter(one.model, folder, "mine")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    change(other, size=4)
    with pytest.raises(ArtifactError):
        folders.load_adapter(one.model, other, "odd")
    assert folders.names(one.model) == folders.active(one.model) == ("mine",)
