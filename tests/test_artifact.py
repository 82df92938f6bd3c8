"""The artifact: what is saved comes back bit for bit, and what was damaged is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from niwaki import artifact, storage
from niwaki.compression.prune.magnitude import Magnitude
from niwaki.compression.quantize.integers import IntegerLinear, UseIntegers
from niwaki.compression.quantize.qat import QAT
from niwaki.errors import ArtifactError
from niwaki.model.load import KeepBlocks, Pretrained
from niwaki.weights import fold

KINDS = [(family, task) for family in ("bert", "llama") for task in ("classification", "ner", "causal_lm")]


def save(one: Any, folder: Path, *forms: str, **settings: Any) -> dict[str, Any]:
    """Save the model, cut or as integers; returns the config that it started from."""
    base_config = one.model.config.to_dict()
    edits: list[Any] = []
    if "cut" in forms:
        edits.append(KeepBlocks(blocks=[2, 0]))
        edits[0].apply(one.model)
    if "integers" in forms:
        context, stage = one.context(), QAT(**settings)
        stage.prepare(one.model, context)
        context.records.update(fold(context.targets))
        edits += stage.finalize(one.model, context)
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits,
    )  # fmt: skip
    return base_config


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize(
    "forms", [(), ("cut",), ("integers",), ("cut", "integers")], ids=lambda f: "+".join(f) or "dense"
)
def test_round_trip(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, forms: tuple[str, ...]
) -> None:
    one = setting(family, task)
    base_config = save(one, tmp_path / "model", *forms, **({"bits": 4, "group": 16} if "integers" in forms else {}))
    torch.manual_seed(99)
    back = artifact.load(tmp_path / "model")
    assert torch.equal(one.logits(back.model), one.logits())
    assert not back.model.training
    assert (back.task, back.labels) == (one.task, one.labels)
    assert back.base_config == json.loads(json.dumps(base_config))
    assert [type(edit) for edit in back.edits] == [{"cut": KeepBlocks, "integers": UseIntegers}[form] for form in forms]
    assert back.columns == ()
    assert back.tokenizer("garden tree")["input_ids"] == one.tokenizer("garden tree")["input_ids"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("family", "task"), KINDS)
@pytest.mark.parametrize("form", ["dense", "cut"])
def test_hugging_face_reads_the_folder(
    setting: Callable[..., Any], tmp_path: Path, family: str, task: str, form: str
) -> None:
    one = setting(family, task)
    save(one, tmp_path / "model", form)
    model = getattr(transformers, one.task.auto_class_of(one.model.config)).from_pretrained(tmp_path / "model")
    assert torch.equal(one.logits(model), one.logits())
    if one.labels:
        assert model.config.id2label == dict(enumerate(one.labels))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_tied_weights_are_stored_once(setting: Callable[..., Any], tmp_path: Path, family: str) -> None:
    one = setting(family, "causal_lm")
    save(one, tmp_path / "model")
    stored = load_file(tmp_path / "model" / artifact.WEIGHTS)
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in one.model.parameters())
    back = artifact.load(tmp_path / "model").model
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


def test_equal_bytes_of_different_tensors_are_both_kept() -> None:
    first = torch.arange(6.0)
    model = nn.Module()
    model.register_buffer("whole", first)
    model.register_buffer("part", first[:3])
    assert set(artifact.unique_tensors(model)) == {"whole", "part"}


def test_integers_are_integers_on_disk(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    save(one, tmp_path / "model", "integers", bits=3, group=8)
    stored = load_file(tmp_path / "model" / artifact.WEIGHTS)
    codes = {name: tensor for name, tensor in stored.items() if name.endswith(".codes")}
    weights = 3 * (4 * 32 * 32 + 2 * 32 * 64)
    assert len(codes) == 18
    assert {tensor.dtype for tensor in codes.values()} == {torch.uint8}
    assert sum(tensor.numel() for tensor in codes.values()) == weights * 3 // 8
    assert sum(stored[n.replace("codes", "scale")].numel() for n in codes) == weights // 8


def pruned(one: Any, pattern: str, bits: int | None = None) -> tuple[dict[str, Any], list[Any]]:
    """The model with masked weights, as integers where `bits` are given; its first config, and the edits."""
    base_config, context, stages = (
        one.model.config.to_dict(),
        one.context(),
        [Magnitude(pattern=pattern, sparsity=None)],
    )
    if bits:
        stages.append(QAT(bits=bits))  # type: ignore[arg-type]
    for stage in stages:
        stage.prepare(one.model, context)
    context.records.update(fold(context.targets))
    return base_config, [edit for stage in stages for edit in stage.finalize(one.model, context)]


def stored(one: Any, folder: Path, made: tuple[dict[str, Any], list[Any]], store: Any = "auto") -> Path:
    base_config, edits = made
    artifact.save(
        folder, model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=edits, store=store,
    )  # fmt: skip
    return folder


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    """Whether both have the same state, bit for bit."""
    states = [{n: t.reshape(-1).view(torch.uint8) for n, t in m.state_dict().items()} for m in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


@pytest.mark.parametrize("bits", [None, 8, 4, 3])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:8"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_zeros_are_not_stored(
    setting: Callable[..., Any], tmp_path: Path, family: str, pattern: str, bits: int | None
) -> None:
    """The file of each kind: by the bits that the weights of the blocks need, the rest being dense."""
    wide = {"hidden_size": 128, "intermediate_size": 256} | ({"head_dim": 32} if family == "llama" else {})
    one = setting(family, overrides=wide)
    with torch.no_grad():
        for parameter in one.model.parameters():  # biases begin as zeros
            parameter.normal_(std=0.1)
    made = pruned(one, pattern, bits)
    folder = stored(one, tmp_path / "auto", made)
    dense = stored(one, tmp_path / "dense", made, "dense")
    assert {path.name for path in folder.glob("*.safetensors")} == {artifact.COMPACT}
    assert {path.name for path in dense.glob("*.safetensors")} == {artifact.WEIGHTS}
    for place in (folder, dense):
        assert same_bits(artifact.load(place).model, one.model)
    state = artifact.unique_tensors(one.model)
    kind, suffix = (IntegerLinear, "codes") if bits else (nn.Linear, "weight")
    names = [name for name, module in one.model.named_modules() if isinstance(module, kind) and "layer" in name]
    assert len(names) == {"bert": 18, "llama": 21}[family]
    needed = 0.0
    for name in names:
        state.pop(f"{name}.{suffix}")
        module: Any = one.model.get_submodule(name)
        weight = module.dequantized() if bits else module.weight
        mask = weight.numel() + int(weight.count_nonzero()) * (bits or 32)
        places = weight.numel() / 8 * ((bits or 32) + 3)  # 3 bits of place, and a value that may have become zero
        needed += min(mask, places if pattern == "1:8" else mask) / 8
    sizes = [artifact.weight_bytes(place) - header(place) for place in (folder, dense)]
    assert sizes[0] == pytest.approx(storage.size(state) + needed, abs=2 * len(names))
    assert sizes[0] < sizes[1]


def header(folder: Path) -> int:
    """Bytes of a safetensors file in front of its tensors."""
    with next(folder.glob("*.safetensors")).open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_zeros_of_a_model_that_lies_transposed_in_its_file(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("gpt2", "causal_lm")
    folder = stored(one, tmp_path / "model", pruned(one, "1:8"))
    assert (folder / artifact.COMPACT).is_file()
    assert same_bits(artifact.load(folder).model, one.model)


def test_a_file_that_is_hardly_smaller_stays_readable(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    with torch.no_grad():
        one.model.bert.encoder.layer[0].output.dense.weight[:, :60] = 0
    folder = stored(one, tmp_path / "model", (one.model.config.to_dict(), []))
    assert {path.name for path in folder.glob("*.safetensors")} == {artifact.WEIGHTS}
    transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_from_pretrained_refuses_what_it_cannot_read(setting: Callable[..., Any], tmp_path: Path) -> None:
    """Rather than make random what it does not find."""
    one = setting()
    folder = stored(one, tmp_path / "model", pruned(one, "1:8"))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_compact_artifact_as_the_start_of_another_training(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    folder = stored(one, tmp_path / "model", pruned(one, "1:8"))
    again = Pretrained(name=str(folder)).load(one.task, one.labels, seed=5)
    assert same_bits(again, one.model)


def test_a_base_with_an_adapter_beside_it_stays_dense(setting: Callable[..., Any], tmp_path: Path) -> None:
    """PEFT puts the adapter on what from_pretrained reads."""
    from niwaki.tuning.lora import LoRA

    one, tuning = setting(), LoRA(rank=2, merge=False)
    pruned(one, "1:8")
    context, base_config = one.context(), one.model.config.to_dict()
    tuning.prepare(one.model, context)
    folder = stored(one, tmp_path / "model", (base_config, tuning.finalize(one.model, context)))
    assert {path.name for path in folder.glob("*.safetensors")} == {artifact.WEIGHTS}
    transformers.AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("name", [artifact.WEIGHTS, artifact.COMPACT])
def test_two_files_of_weights_are_refused(setting: Callable[..., Any], tmp_path: Path, name: str) -> None:
    one = setting()
    folder = stored(one, tmp_path / "model", pruned(one, "1:8"), "dense" if name == artifact.COMPACT else "auto")
    shutil.copy(next(folder.glob("*.safetensors")), folder / name)
    refused(folder, name, "is not listed")
    card = json.loads((folder / "niwaki.json").read_text())
    change_card(folder, files=card["files"] | {name: artifact.stamp(folder / name)})
    refused(folder, "another file of weights beside it")


def test_as_the_start_of_another_training(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    save(one, tmp_path / "model", "cut", "integers")
    again = Pretrained(name=str(tmp_path / "model"))
    dense = again.load(one.task, one.labels, seed=5)
    assert not any(isinstance(module, IntegerLinear) for module in dense.modules())
    for name, module in one.model.named_modules():
        if isinstance(module, IntegerLinear):
            assert torch.equal(dense.get_submodule(name).weight, module.dequantized())
    assert torch.equal(dense.classifier.weight, one.model.classifier.weight)
    other = again.load(one.task, ("a", "b"), seed=5)
    assert other.classifier.out_features == 2
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, one.model.bert.embeddings.word_embeddings.weight)


def test_saving_again_replaces_the_folder(setting: Callable[..., Any], tmp_path: Path) -> None:
    save(setting(), tmp_path / "model")
    (tmp_path / "model" / "stale").write_text("x")
    one = setting(seed=1)
    save(one, tmp_path / "model")
    assert not (tmp_path / "model" / "stale").exists()
    assert torch.equal(one.logits(artifact.load(tmp_path / "model").model), one.logits())


def test_a_failed_save_leaves_nothing_behind(
    setting: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setting()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(one.tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save(one, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_artifact_that_was_there(
    setting: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setting()
    save(one, tmp_path / "model")
    monkeypatch.setattr(artifact, "checksum", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(setting(seed=1), tmp_path / "model")
    monkeypatch.undo()
    assert torch.equal(one.logits(artifact.load(tmp_path / "model").model), one.logits())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    from niwaki.model.tiny import Tiny
    from niwaki.task.classification import Classification

    folder = tmp_path_factory.mktemp("saved") / "model"
    model = Tiny().load(Classification(), ("a", "b"), 0)
    artifact.save(
        folder, model=model, tokenizer=tokenizer, task=Classification(), labels=("a", "b"),
        base_config=model.config.to_dict(), edits=[],
    )  # fmt: skip
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        artifact.load(folder)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def change_card(folder: Path, **fields: Any) -> None:
    card = json.loads((folder / "niwaki.json").read_text())
    (folder / "niwaki.json").write_text(json.dumps(card | fields))


def test_no_artifact(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "niwaki.json")
    refused(tmp_path / "nowhere", "nowhere")


def test_a_truncated_file(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(damaged, "model.safetensors", "truncated")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_altered_byte(damaged: Path, name: str) -> None:
    content = bytearray((damaged / name).read_bytes())
    content[-2] ^= 1
    (damaged / name).write_bytes(content)
    refused(damaged, name, "was altered")


@pytest.mark.parametrize("name", ["generation_config.json", "merges.txt", "notes", "expected.pt"])
def test_a_file_that_is_not_listed(damaged: Path, name: str) -> None:
    (damaged / name).write_text("{}")
    refused(damaged, name, "is not listed in niwaki.json")


def test_a_missing_file(damaged: Path) -> None:
    (damaged / "tokenizer.json").unlink()
    refused(damaged, "tokenizer.json", "is missing")


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema(damaged: Path, schema: object) -> None:
    change_card(damaged, schema=schema)
    refused(damaged, f"schema {schema}", "this version reads 1")


@pytest.mark.parametrize("edit", ["os:system", "niwaki.artifact:shutil", "niwaki.task.ner:NER", ""])
def test_a_foreign_edit(damaged: Path, edit: str) -> None:
    change_card(damaged, edits=[{"edit": edit, "command": "touch sang"}])
    refused(damaged, "edits", edit.replace(":", "."))


@pytest.mark.parametrize("task", ["os:system", "niwaki.model.load:KeepBlocks", "niwaki.task.task:Task"])
def test_a_foreign_task(damaged: Path, task: str) -> None:
    change_card(damaged, task=task)
    refused(damaged, "task")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"schema": 1}', '{"schema": 1, "files": [1]}', "\ud800"])
def test_a_damaged_card(damaged: Path, text: str) -> None:
    (damaged / "niwaki.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(damaged, "niwaki.json", "damaged")


@pytest.mark.parametrize("field", ["task", "task_settings", "labels", "base_config", "edits"])
def test_a_card_that_lacks_a_field(damaged: Path, field: str) -> None:
    card = json.loads((damaged / "niwaki.json").read_text())
    del card[field]
    (damaged / "niwaki.json").write_text(json.dumps(card))
    refused(damaged, "niwaki.json", "damaged", field)


@pytest.mark.parametrize(
    "edit",
    [
        KeepBlocks(blocks=[7]),
        UseIntegers(modules=["no.such"], bits=8, group=None, activation_bits=None),
        UseIntegers(modules=["bert"], bits=8, group=None, activation_bits=None),
    ],
)
def test_an_edit_that_cannot_be_made(damaged: Path, edit: Any) -> None:
    change_card(damaged, edits=[edit.to_json()])
    refused(damaged, "no model that can be built")


@pytest.mark.parametrize("config", [{}, {"model_type": "nothing"}])
def test_a_config_that_is_none(damaged: Path, config: dict[str, Any]) -> None:
    change_card(damaged, base_config=config)
    refused(damaged, "no model that can be built")


def test_weights_of_another_structure(damaged: Path) -> None:
    card = json.loads((damaged / "niwaki.json").read_text())
    change_card(damaged, edits=[KeepBlocks(blocks=[0]).to_json()])
    refused(damaged, "model.safetensors", "does not fit the structure")
    change_card(damaged, edits=[], base_config=card["base_config"] | {"num_hidden_layers": 4})
    refused(damaged, "model.safetensors", "does not fit the structure", "encoder.layer.3")
    change_card(damaged, base_config=card["base_config"] | {"intermediate_size": 48})
    refused(damaged, "do not fit the structure")


def test_a_file_outside_the_folder_is_not_looked_at(damaged: Path) -> None:
    card = json.loads((damaged / "niwaki.json").read_text())
    (damaged.parent / "outside").write_text("x")
    change_card(damaged, files=card["files"] | {"../outside": {"bytes": 1, "sha256": ""}})
    refused(damaged, "../outside")


def test_weights_that_no_checksum_covers_are_refused(damaged: Path) -> None:
    files = json.loads((damaged / "niwaki.json").read_text())["files"]
    del files["model.safetensors"]
    change_card(damaged, files=files)
    refused(damaged, "names no model.safetensors")


def test_the_columns_of_the_training_are_kept(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting()
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=one.model.config.to_dict(), edits=[], columns=("text", "label", "text_pair"),
    )  # fmt: skip
    assert artifact.load(tmp_path / "model").columns == ("text", "label", "text_pair")
    change_card(tmp_path / "model", columns="text")
    refused(tmp_path / "model", "niwaki.json", "damaged")


@pytest.fixture
def with_adapter(setting: Callable[..., Any], tmp_path: Path) -> Path:
    """An artifact with an adapter in a folder beside its weights."""
    from niwaki.tuning.lora import LoRA

    one, tuning = setting(), LoRA(rank=2, merge=False)
    context, base_config = one.context(), one.model.config.to_dict()
    tuning.prepare(one.model, context)
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=base_config, edits=tuning.finalize(one.model, context),
    )  # fmt: skip
    artifact.load(tmp_path / "model")
    return tmp_path / "model"


ADAPTER_FILES = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


def test_files_of_a_folder_are_listed_and_counted(with_adapter: Path) -> None:
    card = json.loads((with_adapter / "niwaki.json").read_text())
    assert set(ADAPTER_FILES) < set(card["files"])
    weights = [with_adapter / "model.safetensors", with_adapter / "adapter" / "adapter_model.safetensors"]
    assert artifact.weight_bytes(with_adapter) == sum(path.stat().st_size for path in weights)


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_damaged_file_of_a_folder(with_adapter: Path, name: str) -> None:
    content = (with_adapter / name).read_bytes()
    (with_adapter / name).write_bytes(content[:-8])
    refused(with_adapter, name, "truncated")
    (with_adapter / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    refused(with_adapter, name, "was altered")
    (with_adapter / name).unlink()
    refused(with_adapter, name, "is missing")


@pytest.mark.parametrize("name", ["adapter/notes", "other/adapter_config.json", "adapter/deep/er", "empty/"])
def test_a_file_of_a_folder_that_is_not_listed(with_adapter: Path, name: str) -> None:
    (with_adapter / name).parent.mkdir(parents=True, exist_ok=True)
    (with_adapter / name).mkdir() if name.endswith("/") else (with_adapter / name).write_text("x")
    refused(with_adapter, name.rpartition("/")[0].partition("/deep")[0], "is not listed in niwaki.json")


@pytest.mark.parametrize(
    "name",
    ["adapter/../../outside", "../model/config.json", "/etc/hostname", "a/b/c", "adapter//x", "./config.json", ".."],
)
def test_a_name_that_leads_elsewhere_is_not_looked_at(with_adapter: Path, name: str) -> None:
    card = json.loads((with_adapter / "niwaki.json").read_text())
    (with_adapter.parent / "outside").write_text("x")
    (with_adapter / "a" / "b").mkdir(parents=True)
    (with_adapter / "a" / "b" / "c").write_text("x")
    path = with_adapter / name
    facts = artifact.stamp(path) if path.is_file() else {"bytes": 1, "sha256": ""}
    change_card(with_adapter, files=card["files"] | {name: facts})
    refused(with_adapter, f"the file {name} is missing")


@pytest.mark.parametrize("folder", ["../other", "", "..", "a/b", "nowhere"])
def test_an_adapter_in_a_folder_elsewhere_is_refused(with_adapter: Path, folder: str) -> None:
    shutil.copytree(with_adapter / "adapter", with_adapter.parent / "other")
    (edit,) = json.loads((with_adapter / "niwaki.json").read_text())["edits"]
    change_card(with_adapter, edits=[edit | {"folder": folder}])
    refused(with_adapter, "needs adapter_config.json" if folder == "nowhere" else "no model that can be built")


def test_saving_again_leaves_no_adapter_behind(with_adapter: Path, setting: Callable[..., Any]) -> None:
    one = setting()
    save(one, with_adapter)
    assert not (with_adapter / "adapter").exists()
    assert torch.equal(one.logits(artifact.load(with_adapter).model), one.logits())
