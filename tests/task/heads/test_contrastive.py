"""SetFit: the loss of pairs by hand, how they are drawn, and the regression in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.pipeline import judge, run
from niwaki.task.heads.contrastive import Contrastive

HEAD = "task.head=contrastive"


def test_the_loss_by_hand() -> None:
    # cos(0, 2) = 0.6, cos(1, 3) = 0.8; 0 and 2 are of one class, 1 and 3 are not: ((1 - 0.6)^2 + 0.8^2) / 2
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])
    batch = {"labels": torch.tensor([0, 1, 0, 2]), "of": torch.tensor([-1, -1, 0, 1])}
    loss = Contrastive().loss(SimpleNamespace(embedding=embedding), batch)
    assert loss.item() == pytest.approx((0.16 + 0.64) / 2)


def test_the_loss_of_a_batch_without_pairs_is_over_all_of_them() -> None:
    # Pairs (0, 1): 0 apart, of one class; (0, 2), (1, 2): cos 0.6 and 0.8, of two.
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    loss = Contrastive().loss(SimpleNamespace(embedding=embedding), {"labels": torch.tensor([0, 0, 1])})
    assert loss.item() == pytest.approx((1 + 0.36 + 0.64) / 3)


def drawn(corpus: Any, epoch: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int, int]]:
    """(text, partner, and the labels of both) of each pair of an epoch."""
    batches = corpus.training()
    batches.batch_sampler.set_epoch(epoch)
    found = []
    for batch in batches:
        ids = [
            tuple(row[mask.bool()].tolist())
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        for place, of in enumerate(batch["of"].tolist()):
            if of >= 0:
                found.append((ids[of], ids[place], int(batch["labels"][of]), int(batch["labels"][place])))
    return found


def test_each_text_has_as_many_pairs_of_both_kinds(begun: Callable[..., Any]) -> None:
    _, corpus, _ = begun(HEAD, "task.pairs=3")
    assert len(corpus.training()) == 8 * 2 * 3 / 4
    pairs = drawn(corpus, 0)
    same = Counter(text for text, _, one, two in pairs if one == two)
    other = Counter(text for text, _, one, two in pairs if one != two)
    texts = {tuple(ids) for ids in corpus.features["train"]["input_ids"][:]}
    assert dict(same) == dict(other) == dict.fromkeys(texts, 3)
    labels = dict(
        zip(map(tuple, corpus.features["train"]["input_ids"][:]), corpus.features["train"]["labels"][:], strict=True)
    )
    assert all(labels[text] == one and labels[partner] == two for text, partner, one, two in pairs)


def test_pairs_are_drawn_anew_in_each_epoch_and_by_the_seed(begun: Callable[..., Any]) -> None:
    corpus = begun(HEAD, "task.pairs=3")[1]
    again = begun(HEAD, "task.pairs=3", "seed=1")[1]
    first, second, other = sorted(drawn(corpus, 0)), sorted(drawn(corpus, 1)), sorted(drawn(again, 0))
    assert first == sorted(drawn(corpus, 0))
    assert first != second
    assert first != other


def embeddings(made: Any, corpus: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    found, labels = [], []
    for row in corpus.features["train"]:
        batch = made.task.collate([row], corpus.tokenizer)
        with torch.no_grad():
            found.append(model(**made.task.inputs(batch)).embedding[0].numpy())
        labels.append(row["labels"])
    return np.stack(found), np.asarray(labels)


def test_the_head_is_the_regression_on_the_training_rows(begun: Callable[..., Any]) -> None:
    made, corpus, model = begun(HEAD)
    texts, labels = embeddings(made, corpus, model)
    expected = LogisticRegression(max_iter=1000).fit(texts, labels).predict_proba(texts)
    with torch.no_grad():
        chances = model.head(torch.from_numpy(texts)).softmax(-1)
    assert np.allclose(chances.numpy(), expected, atol=1e-4)
    assert not list(model.head.parameters())


def test_the_head_of_two_classes(begun: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(
        "".join(f'{{"text": "{t}", "label": "{y}"}}\n' for t, y in (("up", "u"), ("over", "u"), ("x", "d")))
    )
    made, corpus, model = begun(HEAD, *(f"data.{split}={path}" for split in ("train", "validation", "test")))
    texts, labels = embeddings(made, corpus, model)
    expected = LogisticRegression(max_iter=1000).fit(texts, labels).predict_proba(texts)
    with torch.no_grad():
        assert np.allclose(model.head(torch.from_numpy(texts)).softmax(-1).numpy(), expected, atol=1e-4)


def test_a_fit_brings_classes_together_and_the_head_is_of_its_end(recipe: Callable[..., Any], tmp_path: Path) -> None:
    made = recipe(
        HEAD, "task.pairs=4", "trainer.max_steps=30", "optimizer.lr=3e-3", "schedule=constant", "measure=full"
    )
    metrics = run(made, tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    corpus = judge_of(made)
    texts, labels = embeddings(made, corpus, saved.model)
    cosine = texts @ texts.T
    same = labels[:, None] == labels
    assert cosine[same].mean() > cosine[~same].mean() + 0.5
    refitted = LogisticRegression(max_iter=1000).fit(texts, labels)
    assert np.allclose(saved.model.head.weight.numpy(), refitted.coef_, atol=1e-3)
    assert metrics["after"]["test"]["accuracy"] == 1.0
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]  # as it was validated
    assert np.allclose(kept["model.head.weight"].numpy(), refitted.coef_, atol=1e-3)


def judge_of(made: Any) -> Any:
    from niwaki.pipeline import judge

    return judge(made)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.shots=0"], r"data\.shots=0: task\.head=contrastive needs training rows"),
        (
            ["compression=[distill/logits]", "compression.logits.teacher=t"],
            r"distill/logits and task\.head=contrastive",
        ),
        (["tuning=lora", "tuning.merge=false"], r"tuning\.merge=false and task\.head=contrastive"),
        (["tuning=head"], r"tuning=head: this model has no head with weights that learn"),
        (["task.pairs=0"], r"task\.pairs=0: needs a whole number of at least 1"),
        (["compression=[prune/width]"], r"head \(Regression\) reads the stream"),
    ],
)
def test_refusals(begun: Callable[..., Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun(HEAD, *overrides)


def test_the_regression_is_that_of_the_compressed_model(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """What comes after the fit changes the embeddings; computed again in the artifact, the head is the same."""
    settings = [
        "compression=quantize/weight_only",
        "compression.weight_only.bits=2",
        "compression.weight_only.group=16",
    ]
    made = recipe(HEAD, "task.pairs=3", "trainer.max_steps=4", *settings)
    run(made, tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    stored = saved.model.head.weight.clone()
    corpus, _ = judge(made)
    made.task.refit(saved.model, corpus)
    assert torch.allclose(saved.model.head.weight, stored, atol=1e-3)
