"""Capitals for a model of small letters: which words have them, segments of their own, and a start that is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki import artifact, compose, inference, pipeline
from niwaki.errors import ConfigError
from niwaki.model.teacher import check_job
from niwaki.model.tiny import Tiny
from niwaki.task.casing import CAPITALS, INITIAL, INSIDE, PLAIN, segment_of
from niwaki.task.ner import NER

SETTINGS = [
    "task=ner", "task.casing=true", "model=tiny-bert", "data.limit=40", "trainer.max_steps=4", "optimizer.lr=1e-2",
    "trainer.precision=fp32", "trainer.limit_validation_batches=1", "logger=none", "callbacks=[]", "measure=scores",
]  # fmt: skip


def run(folder: Path) -> dict[str, Any]:
    config = compose.compose(SETTINGS).config
    return pipeline.run(compose.build(config), folder, config)


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("word", PLAIN), ("1996-08-22", PLAIN), (".", PLAIN), ("", PLAIN), ("数据", PLAIN),
        ("Word", INITIAL), ("I", INITIAL), ("O'brien", INITIAL), ("'Tis", INITIAL), ("Élan", INITIAL),
        ("EU", CAPITALS), ("U.N.", CAPITALS), ("F1-GP", CAPITALS),
        ("McDonald", INSIDE), ("iPod", INSIDE), ("EU-wide", INSIDE),
    ],
)  # fmt: skip
def test_kinds_of_words(word: str, kind: int) -> None:
    assert segment_of(word) == kind


def test_every_piece_is_told_in_every_window(setting: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    one.task = NER(casing=True, max_length=6, overlap=0.25)
    words = ["Ada", "was", "in", "UK"]
    rows = one.features({"tokens": [words], "tags": [["B-PER", "O", "O", "O"]]})
    told = [
        list(zip(one.tokenizer.convert_ids_to_tokens(row["input_ids"]), row["token_type_ids"], strict=True))
        for row in rows
    ]
    assert told[0] == [("[CLS]", 0), ("a", 2), ("##d", 2), ("##a", 2), ("w", 0), ("[SEP]", 0)]
    assert told[-1][-3:] == [("u", 3), ("##k", 3), ("[SEP]", 0)]
    batch = one.task.collate([dict(row) for row in rows], one.tokenizer)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert torch.equal(one.task.inputs(batch)["token_type_ids"], batch["token_type_ids"])


def test_a_model_starts_as_it_was() -> None:
    spec, labels = Tiny(name="bert"), ("B-LOC", "O")
    plain, cased = (spec.load(NER(casing=on), labels, 0) for on in (False, True))
    ids = torch.randint(5, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    told = torch.tensor([[0, 2, 3, 4, 0, 2, 2], [0, 0, 4, 4, 3, 2, 0]])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, cased(input_ids=ids, token_type_ids=told).logits)
    assert cased.config.type_vocab_size == 5
    assert plain.config.type_vocab_size == 2


def test_capitals_are_learned_and_the_artifact_keeps_them(tmp_path: Path) -> None:
    metrics = run(tmp_path)
    assert metrics["parity"] < 1e-5
    saved = artifact.load(tmp_path / "model")
    assert saved.model.config.type_vocab_size == 5
    table = saved.model.base_model.embeddings.token_type_embeddings.weight
    start = compose.build(compose.compose(SETTINGS).config).model.load(NER(casing=True), saved.labels, 0)
    before = start.base_model.embeddings.token_type_embeddings.weight
    # Rows that no word was of keep what they were but for weight decay, which is the same for all that began alike.
    moved = [float((table[kind] - before[kind]).detach().norm()) for kind in (1, INITIAL, CAPITALS, INSIDE)]
    assert min(moved[1:]) > 3 * moved[0]
    encoded = [saved.task.encode({"tokens": [text.split()]}, saved.tokenizer, saved.labels) for text in ("ada", "ADA")]
    assert encoded[0]["input_ids"] == encoded[1]["input_ids"]
    batches = [
        saved.task.inputs(saved.task.collate([{k: v[0] for k, v in one.items()}], saved.tokenizer)) for one in encoded
    ]
    with torch.no_grad():
        low, high = (saved.model(**batch).logits for batch in batches)
    assert not torch.allclose(low, high, atol=1e-4)
    assert next(iter(inference.answers(saved, [{"text": "Ada"}], 4)))["text"] == "Ada"


def test_another_training_starts_from_it(tmp_path: Path) -> None:
    run(tmp_path)
    saved = artifact.load(tmp_path / "model")
    again = compose.compose([*SETTINGS[:2], "model=pretrained", f"model.name={tmp_path / 'model'}", *SETTINGS[3:]])
    recipe = compose.build(again.config)
    model = recipe.model.load(recipe.task, saved.labels, 0)
    assert torch.equal(*(one.base_model.embeddings.token_type_embeddings.weight for one in (saved.model, model)))


@pytest.mark.parametrize("family", ["distilbert", "llama", "deberta-v2", "modernbert", "gpt2"])
def test_a_model_without_segments_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=r"^task\.casing=true: needs a model with embeddings of segments"):
        Tiny(name=family).load(NER(casing=True), ("B-LOC", "O"), 0)


@pytest.mark.parametrize("tuning", ["lora", "head", "prefix", "bitfit", "gradual"])
def test_a_tuning_that_would_not_learn_it_is_refused(tuning: str) -> None:
    with pytest.raises(ConfigError, match=rf"^task\.casing=true and tuning={tuning}: "):
        compose.build(compose.compose([*SETTINGS, f"tuning={tuning}"]).config)


def test_a_teacher_reads_capitals_too_or_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    place = str(tmp_path / "model")
    saved = artifact.load(tmp_path / "model")
    check_job(place, NER(casing=True), saved.labels, "teacher")
    with pytest.raises(
        ConfigError, match=r"^teacher='.*': reads texts in another form than the student's.*task\.casing"
    ):
        check_job(place, NER(), saved.labels, "teacher")
    bare = tmp_path / "bare"
    Tiny(name="distilbert").load(NER(), saved.labels, 0).save_pretrained(bare)
    Tiny(name="distilbert").tokenizer().save_pretrained(bare)
    with pytest.raises(ConfigError, match=r"^teacher='.*bare': cannot read what the student does \(task\.casing"):
        check_job(str(bare), NER(casing=True), saved.labels, "teacher")


def test_a_model_that_is_told_capitals_goes_on_so(tmp_path: Path) -> None:
    """With any tuning, for what tells capitals has learned; and not without them, which it would miss."""
    run(tmp_path)
    start = [*SETTINGS[:2], "model=pretrained", f"model.name={tmp_path / 'model'}", *SETTINGS[3:]]
    assert compose.build(compose.compose([*start, "tuning=lora"]).config).tuning.name == "lora"
    plain = compose.build(compose.compose([*start, "task.casing=false"]).config)
    with pytest.raises(ConfigError, match=r"^task\.casing=false: the model that this starts from is told capitals"):
        plain.model.load(plain.task, artifact.load(tmp_path / "model").labels, 0)


@pytest.mark.parametrize("export", ["onnx", "hf"])
def test_exports_are_told_too(export: str, tmp_path: Path) -> None:
    config = compose.compose([*SETTINGS, f"export=[{export}]", "compression=[quantize/embeddings]"]).config
    metrics = pipeline.run(compose.build(config), tmp_path, config)
    assert metrics["exports"][export]["test"] == pytest.approx(metrics["after"]["test"], abs=1e-4)
    assert "token_type_ids" in (tmp_path / "exports" / export / "export.json").read_text()
