"""Loading: folders, packages, changes of the config, heads from a seed, empty models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.model.load import KeepBlocks, Pretrained, dropouts
from niwaki.model.tiny import Tiny
from niwaki.task.causal_lm import CausalLM


@pytest.fixture
def folder(setting: Callable[..., Any], tmp_path: Path) -> Path:
    """A Hugging Face folder of a tiny classifier."""
    one = setting()
    one.model.save_pretrained(tmp_path / "hf")
    one.tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_folder_with_the_same_labels_keeps_its_head(setting: Callable[..., Any], folder: Path) -> None:
    one = setting()
    model = Pretrained(name=str(folder)).load(one.task, one.labels, seed=7)
    assert torch.equal(one.logits(model), one.logits())
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_new_head_depends_on_the_seed_and_the_rest_does_not(setting: Callable[..., Any], folder: Path) -> None:
    one = setting("bert", "classification")
    load = lambda seed: Pretrained(name=str(folder)).load(one.task, ("a", "b"), seed).state_dict()  # noqa: E731
    first, again, other = load(1), load(1), load(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert {n for n in first if not torch.equal(first[n], other[n])} == {"classifier.weight"}
    assert first["classifier.weight"].shape == (2, 32)


def test_labels_are_written_to_the_config(folder: Path, setting: Callable[..., Any]) -> None:
    model = Pretrained(name=str(folder)).load(setting().task, ("a", "b"), 0)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model.config.label2id == {"a": 0, "b": 1}


def test_dropout_and_overrides_reach_the_model(folder: Path, setting: Callable[..., Any]) -> None:
    one = setting()
    spec = Pretrained(name=str(folder), dropout=0.37, overrides={"hidden_act": "relu"})
    model = spec.load(one.task, one.labels, 0)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.37}
    assert model.config.hidden_act == "relu"
    assert set(dropouts(model.config)) >= {"hidden_dropout_prob", "attention_probs_dropout_prob"}


def test_an_override_of_no_field(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.overrides\.widht: a bert config has no such field"):
        Pretrained(name=str(folder), overrides={"widht": 3}).config()


def test_the_empty_model_has_shapes_and_no_weights(folder: Path, setting: Callable[..., Any]) -> None:
    one = setting()
    spec = Pretrained(name=str(folder), layers=[0, 2])
    empty, whole = spec.empty(one.task, one.labels), spec.load(one.task, one.labels, 0)
    assert all(p.is_meta for p in empty.parameters())
    edits = spec.cut(whole)
    assert edits == [KeepBlocks(blocks=[0, 2])]
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert whole.config.num_hidden_layers == 2


def test_no_cut_without_layers(setting: Callable[..., Any]) -> None:
    assert Tiny().cut(setting().model) == []


def test_a_padding_token_is_chosen_where_there_is_none(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert Pretrained(name=str(folder)).tokenizer().pad_token_id is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropout": 1.0}, r"^model\.dropout=1\.0"),
        ({"dropout": -0.1}, r"^model\.dropout="),
        ({"layers": []}, r"^model\.layers=\[\]"),
        ({"layers": [0, -1]}, r"^model\.layers=\[0, -1\]"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pretrained(name="x", **fields)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        _ = Pretrained(name=name).place


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(
        ConfigError,
        match=r"model\.name='package:no_such_model/m': the package is not installed; pip install no-such-model",
    ):
        _ = Pretrained(name="package:no_such_model/m").place


def test_a_package_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "carrier_of_a_model").mkdir()
    (tmp_path / "carrier_of_a_model" / "__init__.py").write_text("raise RuntimeError('was run')")
    monkeypatch.syspath_prepend(tmp_path)
    place = Pretrained(name="package:carrier_of_a_model/inner").place
    assert place == str(tmp_path / "carrier_of_a_model" / "inner")


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    for load in (Pretrained(name=str(tmp_path)).config, Pretrained(name=str(tmp_path)).tokenizer):
        with pytest.raises(ConfigError, match="cannot be loaded") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_name_inside_of_a_package_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "intruder_package" / "sub").mkdir(parents=True)
    (tmp_path / "intruder_package" / "__init__.py").write_text("raise RuntimeError('was run')")
    (tmp_path / "intruder_package" / "sub" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.name='package:intruder_package\.sub/x': needs package:NAME/FOLDER"):
        _ = Pretrained(name="package:intruder_package.sub/x").place


@pytest.fixture(params=["hugging face", "artifact"])
def source(request: pytest.FixtureRequest, setting: Callable[..., Any], folder: Path, tmp_path: Path) -> Path:
    """The same tiny classifier in either kind of folder."""
    if request.param == "hugging face":
        return folder
    one = setting()
    artifact.save(
        tmp_path / "artifact", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=one.model.config.to_dict(), edits=[],
    )  # fmt: skip
    return tmp_path / "artifact"


@pytest.mark.parametrize("labels", [("maybe", "no", "yes"), ("a", "b")])
@pytest.mark.parametrize(
    ("overrides", "lacking"),
    [
        ({"intermediate_size": 48}, r"bert\.encoder\.layer\.0\.intermediate\.dense\.weight"),
        ({"num_hidden_layers": 4}, r"bert\.encoder\.layer\.3\.attention\.self\.query\.weight"),
        ({"max_position_embeddings": 600}, r"bert\.embeddings\.position_embeddings\.weight"),
    ],
)
def test_a_backbone_is_never_random(
    source: Path, setting: Callable[..., Any], overrides: dict[str, int], lacking: str, labels: tuple[str, ...]
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^model\.name=.*: has no weights that fit {lacking}, which would stay"
    ) as said:
        Pretrained(name=str(source), overrides=overrides).load(setting().task, labels, 0)
    assert "\n" not in str(said.value)


def test_a_head_that_does_not_learn_is_never_random(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no weights that fit cls\.predictions.*made for causal_lm"):
        Pretrained(name=str(source)).load(CausalLM(), (), 0)


def test_a_pooler_that_is_not_there_is_new(setting: Callable[..., Any], tmp_path: Path) -> None:
    tagger = setting("bert", "ner")
    tagger.model.save_pretrained(tmp_path / "tagger")
    tagger.tokenizer.save_pretrained(tmp_path / "tagger")
    model = Pretrained(name=str(tmp_path / "tagger")).load(setting().task, ("a", "b"), 0)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(model.bert.get_parameter(name), tagger.model.bert.get_parameter(name))


@pytest.mark.parametrize("tiny", [True, False])
def test_a_model_without_a_padding_token_gets_the_tokenizers(
    setting: Callable[..., Any], tmp_path: Path, tiny: bool
) -> None:
    one = setting("llama")
    spec: Pretrained = Tiny(name="llama", overrides={"pad_token_id": None})
    assert spec.config().pad_token_id is None
    if not tiny:
        bare = one.model
        bare.config.pad_token_id = None
        bare.save_pretrained(tmp_path / "llama")
        one.tokenizer.save_pretrained(tmp_path / "llama")
        spec = Pretrained(name=str(tmp_path / "llama"))
    one.model = spec.load(one.task, one.labels, 0)
    assert one.model.config.pad_token_id == one.tokenizer.pad_token_id
    assert one.model.get_input_embeddings().padding_idx is None  # its row learns
    rows = {"text": ["a pine", "the old garden tree"], "label": ["yes", "no"]}
    with torch.no_grad():
        both = one.model(**one.task.inputs(one.batch(rows))).logits
        alone = one.model(**one.task.inputs(one.batch({key: values[:1] for key, values in rows.items()}))).logits
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_a_tokenizer_that_can_pad_with_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Pretrained(name=str(folder), overrides={"pad_token_id": None})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({n: v for n, v in settings.items() if n not in ("pad_token", "eos_token")})
    )
    with pytest.raises(ConfigError, match="neither a padding token nor an end token"):
        spec.tokenizer()


def test_a_dropout_leaves_no_block_out() -> None:
    config = Tiny(name="bart", dropout=0.3).config()
    assert (config.dropout, config.encoder_layerdrop, config.decoder_layerdrop) == (0.3, 0.0, 0.0)


@pytest.mark.parametrize(("family", "segments"), [("gpt2", False), ("distilbert", False), ("bert", True)])
def test_segments_only_for_a_model_that_tells_them_apart(
    setting: Callable[..., Any], tmp_path: Path, family: str, segments: bool
) -> None:
    one = setting(family)
    one.model.save_pretrained(tmp_path / "hf")
    one.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    one.tokenizer.save_pretrained(tmp_path / "hf")
    tokenizer = Pretrained(name=str(tmp_path / "hf")).tokenizer()
    tokenizer.save_pretrained(tmp_path / "again")
    for each in (tokenizer, Tiny(name=family).tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert ("token_type_ids" in each("a", "b")) is segments
