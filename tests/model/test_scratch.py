"""A model from nothing: the tokenizer is that of the training rows, the sizes are those that were asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from niwaki import artifact, compose, pipeline
from niwaki.data.files import Files
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy, known_families
from niwaki.model.scratch import SPECIAL, Scratch, texts_in
from niwaki.task.classification import Classification
from niwaki.task.translation import Translation

LINES = [f"The {kind} tree {verb} in the {place}" for kind in ("old", "tall", "young", "bent") for verb in
         ("stood", "grew", "was cut") for place in ("garden", "wood", "yard")]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Files:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text, "label": "ab"[i % 2], "source": text, "target": text[::-1]} for i, text in enumerate(LINES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Files(train=str(path), validation=str(path), test=str(path))


@pytest.mark.parametrize("family", known_families())
def test_any_family_of_any_size_learns(family: str, source: Files) -> None:
    model_of = Scratch(name=family, blocks=3, width=48, heads=3, neurons=80, vocabulary=400, positions=64)
    writes = model_of.shape().is_encoder_decoder
    task: Any = Translation(max_length=32, max_target_length=32) if writes else Classification(max_length=32)
    model_of.learn(source, task.needs, 0)
    labels = () if writes else ("a", "b")
    model, tokenizer = model_of.load(task, labels, 0), model_of.tokenizer()
    anatomy = Anatomy.of(model)
    assert [getattr(model.config, stack.count) for stack in anatomy.stacks] == [3] * len(anatomy.stacks)
    linears = anatomy.linears().values()
    assert {48, 80} >= {size for linear in linears for size in linear.weight.shape} & {48, 80, 192}
    assert anatomy.embeddings.weight.shape[0] == len(tokenizer) <= 500
    rows = {"text": LINES[:4], "label": ["a", "b"] * 2, "source": LINES[:4], "target": LINES[:4]}
    columns = task.encode({name: rows[name] for name in task.needs.required}, tokenizer, labels)
    features = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = task.collate(features, tokenizer)
    loss = task.loss(model(**task.inputs(batch)), batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert (
        tokenizer.decode(tokenizer(LINES[0])["input_ids"], skip_special_tokens=True).lower().strip() == LINES[0].lower()
    )


def test_the_tokenizer_is_that_of_the_training_rows(source: Files, tmp_path: Path) -> None:
    spec = Scratch(vocabulary=300)
    spec.learn(source, Classification().needs, 0)
    tokenizer = spec.tokenizer()
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == SPECIAL
    assert tokenizer.tokenize("The garden") == ["the", "Ġgarden"]
    assert tokenizer.tokenize("qé") == ["q", "e"]  # BERT's normalizer, in lower case
    again = Scratch(vocabulary=300)
    again.learn(source, Classification().needs, 0)
    assert again.tokenizer().get_vocab() == tokenizer.get_vocab()
    assert [row for row in texts_in([{"a": ["x", 1]}, "y", None])] == ["x", "y"]


def test_every_process_learns_the_same_tokens(source: Files) -> None:
    code = (
        "import sys, json; from niwaki.data.files import Files; from niwaki.model.scratch import Scratch; "
        "from niwaki.task.classification import Classification; s = Scratch(vocabulary=330); p = sys.argv[1]; "
        "s.learn(Files(train=p, validation=p, test=p), Classification().needs, 0); "
        "print(json.dumps(s.tokenizer().get_vocab(), sort_keys=True))"
    )
    command = [sys.executable, "-c", code, str(source.train)]
    said = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(said) == 1


def test_pretraining_in_one_line_and_tuning_from_it(source: Files, tmp_path: Path) -> None:
    """The artifact holds tokenizer and sizes; a task starts from its backbone."""
    common = ["data=files", f"data.train={source.train}", "trainer=debug", "logger=none"]
    common += ["measure=scores", "callbacks=[]", "task.max_length=16"]
    first = tmp_path / "first"
    first.mkdir()
    settings = ["task=masked_lm", "model=scratch", "model.width=32", "model.vocabulary=330", *common]
    config = compose.compose(settings).config
    pipeline.run(compose.build(config), first, config)
    saved = artifact.load(first / "model")
    assert saved.tokenizer.tokenize("the garden") == ["the", "Ġgarden"]
    assert saved.model.config.hidden_size == 32
    second = tmp_path / "second"
    second.mkdir()
    settings = ["model=pretrained", f"model.name={first}", *common, "trainer.max_epochs=0", "trainer.max_steps=null"]
    config = compose.compose(settings).config
    pipeline.run(compose.build(config), second, config)
    tuned = artifact.load(second / "model").model
    assert torch.equal(
        tuned.base_model.embeddings.word_embeddings.weight, saved.model.base_model.embeddings.word_embeddings.weight
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"name": "gru"}, "name"), ({"heads": 3}, "heads"), ({"width": 6}, "width"), ({"vocabulary": 10}, "vocabulary"),
        ({"blocks": 0}, "blocks"), ({"heads": 128}, "heads"), ({"positions": 0}, "positions"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.{name}="):
        Scratch(**fields)
