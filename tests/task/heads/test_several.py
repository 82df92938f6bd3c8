"""Heads where a text may have several labels: a logit of yes against no for each, by hand and through a whole run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from niwaki import artifact, inference
from niwaki.errors import ConfigError
from niwaki.pipeline import run
from niwaki.task.heads.contrastive import Contrastive, of_one_class, yes_or_no
from niwaki.task.heads.label_embedding import LabelVectors
from niwaki.task.multi_label import MultiLabel

NLI = "model.overrides={id2label:{0:neutral,1:contradiction,2:entailment}}"
ROWS = [
    ("a rose is red", ["red"]), ("the sky is blue", ["blue"]), ("red and blue", ["blue", "red"]), ("nothing", []),
    ("green and red grass", ["green", "red"]), ("green", ["green"]), ("so blue", ["blue"]), ("a word", []),
]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "several.jsonl"
    path.write_text("".join(json.dumps({"text": text, "labels": labels}) + "\n" for text, labels in ROWS))
    return str(path)


@pytest.mark.parametrize(
    ("head", "more"),
    [
        ("label_embedding", ["data.shots=0"]),
        ("label_embedding", ["compression=[prune/magnitude,quantize/qat]"]),
        ("contrastive", ["task.pairs=2", "tuning=lora"]),
        ("entailment", [NLI, "compression=[quantize/qat]"]),
    ],
)
def test_each_runs_and_answers(head: str, more: list[str], recipe: Callable[..., Any], tmp_path: Path) -> None:
    metrics = run(recipe("task=multi_label", f"task.head={head}", *more), tmp_path, {})
    assert metrics["parity"] < 1e-5
    saved = artifact.load(tmp_path / "model")
    (said,) = inference.answers(saved, [{"text": "red and blue"}], 4)
    assert set(said["scores"]) == {"blue", "green", "red"}
    assert said["labels"] == [label for label, chance in said["scores"].items() if chance > 0.5]


def test_the_offset_is_the_mean_cosine_with_the_other_labels() -> None:
    vectors = LabelVectors(3, 2, temperature=0.5, several=True)
    vectors.take(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    # cosines: 0 with 1: 0, 0 with 2: 0.6, 1 with 2: 0.8
    assert vectors.offset is not None
    assert vectors.offset.tolist() == pytest.approx([0.3, 0.4, 0.7])
    logits = vectors(torch.tensor([[1.0, 0.0]]))
    assert logits[0].tolist() == pytest.approx([(1 - 0.3) / 0.5, (0 - 0.4) / 0.5, (0.6 - 0.7) / 0.5], abs=1e-6)


def test_the_offset_learns_and_one_label_a_text_has_none(begun: Callable[..., Any], tmp_path: Path) -> None:
    made, corpus, model = begun("task=multi_label", "task.head=label_embedding")
    batch = next(iter(corpus.evaluation("test")))
    made.task.loss(model(**made.task.inputs(batch)), batch).backward()
    assert bool(model.head.offset.grad.any())
    assert LabelVectors(3, 2, 0.05).offset is None


def test_entailment_is_judged_against_contradiction(begun: Callable[..., Any]) -> None:
    made, corpus, model = begun("task=multi_label", "task.head=entailment", NLI)
    assert made.task.chosen.places(model.config) == (2, 1)
    batch = next(iter(corpus.evaluation("test")))
    with torch.no_grad():
        found = model(**made.task.inputs(batch)).logits
        one = {name: tensor[:, 1] for name, tensor in made.task.inputs(batch).items()}
        pair = type(model).forward(model, **one).logits
    assert torch.allclose(found[:, 1], pair[:, 2] - pair[:, 1], atol=1e-5)
    loss = made.task.loss(SimpleNamespace(logits=found), batch)
    assert float(loss) == pytest.approx(
        float(functional.binary_cross_entropy_with_logits(found, batch["labels"].float())), rel=1e-5
    )
    with pytest.raises(ConfigError, match=r"needs a model of natural language inference, with a label 'contradiction'"):
        begun("task=multi_label", "task.head=entailment", "model.overrides={id2label:{0:entailment,1:other}}")


def test_texts_that_share_a_label_are_of_one_class() -> None:
    first, second = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]]), np.array([0, 1, 0])
    assert of_one_class(first, second).tolist() == [True, False, False]
    none = np.array([0, 0, 0])
    assert of_one_class(first, none).tolist() == [False, False, True]  # two without any label have the same
    assert of_one_class(torch.tensor([1, 2]), torch.tensor([1, 1])).tolist() == [True, False]
    # cos(0, 1) = 0.6 share one, cos(0, 2) = 0.8 and cos(1, 2) = 0.96 share none
    embedding = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    batch = {"labels": torch.tensor([[1, 1], [0, 1], [0, 0]])}
    loss = Contrastive(several=True).loss(SimpleNamespace(embedding=embedding), batch)
    assert loss.item() == pytest.approx((0.4**2 + 0.8**2 + 0.96**2) / 3, abs=1e-6)


def test_a_regression_for_each_label(begun: Callable[..., Any]) -> None:
    made, corpus, model = begun("task=multi_label", "task.head=contrastive")
    with torch.no_grad():
        found = [
            (model(**made.task.inputs(batch)).embedding, batch["labels"])
            for batch in (made.task.collate([row], corpus.tokenizer) for row in corpus.features["train"])
        ]
    texts, labels = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    for place in range(3):
        fitted = LogisticRegression(max_iter=1000).fit(texts, labels[:, place])
        expected = fitted.predict_proba(texts)[:, 1]
        chances = model.head(torch.from_numpy(texts))[:, place].sigmoid()
        assert np.allclose(chances.numpy(), expected, atol=1e-4)


def test_a_label_that_all_rows_have_or_none() -> None:
    texts = torch.randn(5, 4)
    for given, odds in ((torch.zeros(5), 0.5 / 5.5), (torch.ones(5), 5.5 / 0.5)):
        weight, bias = yes_or_no(texts, given)
        assert not weight.any()
        assert bias.exp().item() == pytest.approx(odds)


def test_pairs_of_texts_without_a_label(begun: Callable[..., Any]) -> None:
    """They are of one class with one another, and never with themselves."""
    _, corpus, _ = begun("task=multi_label", "task.head=contrastive", "task.pairs=3")
    found = []
    for batch in corpus.training():
        ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        for place, of in enumerate(batch["of"].tolist()):
            if of >= 0 and not batch["labels"][of].any():
                found.append((ids[of], ids[place], bool(batch["labels"][place].any())))
    assert len(found) == 2 * 6
    assert sum(not labelled for _, _, labelled in found) == 6
    assert {tuple(other) for one, other, labelled in found if not labelled} <= {tuple(one) for one, _, _ in found}


def test_a_few_rows_of_each_label(begun: Callable[..., Any]) -> None:
    _, corpus, _ = begun("task=multi_label", "task.head=label_embedding", "data.shots=2")
    labels = torch.tensor(corpus.features["train"]["labels"][:])
    assert bool((labels.sum(0) >= 2).all())
    assert len(labels) <= 6


@pytest.mark.parametrize("head", ["prompt", "in_context"])
def test_a_head_that_says_one_label_is_refused(head: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^task\.head={head}: says which one .* choose "
        r"task\.head=contrastive or entailment or label_embedding or linear$",
    ):
        MultiLabel(head=head)
