"""Retrieval: the loss by hand, ranks against torchmetrics, and what is read of a history."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lifecycle import begin, finish, recipe_of, train, write_rows
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.retrieval import RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from niwaki import artifact
from niwaki.errors import ConfigError, DataError
from niwaki.inference import answers
from niwaki.task.retrieval import Retrieval, measures


def outputs(histories: list[list[float]], candidates: list[list[float]]) -> Any:
    return SimpleNamespace(logits=torch.tensor([*histories, *candidates]))


def batch_of(labels: list[int], query: list[int], item: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(one) for name, one in (("labels", labels), ("query", query), ("item", item))}


def test_the_loss_by_hand() -> None:
    # Cosines of the first history: 1 (its own), 0.6, 0 and, of a row with label 0, 0.8; by 0.5.
    said = outputs([[1.0, 0.0], [0.0, 1.0]] * 2, [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6]])
    batch = batch_of([1, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8])
    loss = Retrieval(temperature=0.5).loss(said, batch)
    exponentials = [math.exp(cosine / 0.5) for cosine in (1.0, 0.6, 0.0, 0.8)]
    assert loss.item() == pytest.approx(-math.log(exponentials[0] / sum(exponentials)), abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "query", "item"),
    [
        ([1, 0, 0, 0], [1, 2, 3, 4], [5, 5, 7, 8]),  # an equal text elsewhere
        ([1, 1, 0, 0], [1, 1, 3, 4], [5, 6, 7, 8]),  # another one that follows the same history
    ],
)
def test_what_is_no_negative(labels: list[int], query: list[int], item: list[int]) -> None:
    said = outputs([[1.0, 0.0]] * 4, [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.8, 0.6]])
    logits, own = Retrieval(temperature=1.0).counted(said, batch_of(labels, query, item))
    assert own[0] == 0
    first = [math.exp(cosine) for cosine in (1.0, 0.0, 0.8)]
    assert logits[0].softmax(-1)[0].item() == pytest.approx(first[0] / sum(first), abs=1e-6)


def test_an_equal_text_of_another_row_that_follows() -> None:
    """Rows 0 and 1 have one history, which 5 and 6 follow; 6 stands once more, as a wrong candidate of row 2."""
    said = outputs([[1.0, 0.0]] * 3, [[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    logits, _ = Retrieval().counted(said, batch_of([1, 1, 0], [1, 1, 3], [5, 6, 6]))
    assert logits[0].softmax(-1).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert logits[1].softmax(-1).tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_a_batch_in_which_nothing_follows_has_no_loss() -> None:
    said = SimpleNamespace(logits=torch.ones(4, 2, requires_grad=True))
    loss = Retrieval().loss(said, batch_of([0, 0], [1, 2], [3, 4]))
    loss.backward()
    assert loss.item() == 0


def test_measures_of_one_query_by_hand() -> None:
    # Relevant at ranks 2 and 12: (1 / log2(3)) / (1 + 1 / log2(3))
    found = measures([12, 2])
    assert found["recall@1"] == 0
    assert found["recall@5"] == found["recall@10"] == 0.5
    assert found["mrr"] == 0.5
    assert found["ndcg@10"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))


def test_scores_against_torchmetrics() -> None:
    """30 candidates, 12 histories that one to three of them follow, in batches with rows of both labels."""
    generator = torch.Generator().manual_seed(0)
    items = torch.nn.functional.normalize(torch.randn(30, 6, generator=generator), dim=-1)
    queries = torch.nn.functional.normalize(torch.randn(12, 6, generator=generator), dim=-1)
    rows = [(q, (7 * q + j) % 30, int(j <= q % 3)) for q in range(12) for j in range(5)]
    scores = Retrieval().scores(())
    for start in range(0, len(rows), 8):
        query, item, labels = (list(one) for one in zip(*rows[start : start + 8], strict=True))
        said = SimpleNamespace(logits=torch.cat([queries[query], items[item]]))
        scores.update(said, batch_of(labels, query, item))
    present = sorted({item for _, item, _ in rows})
    cosines = queries @ items[present].T
    follows = torch.tensor([[(q, item, 1) in rows for item in present] for q in range(12)])
    # torchmetrics takes what has a score below 0 for not retrieved.
    index = torch.arange(12)[:, None].expand_as(cosines)
    given = cosines.flatten() + 2, follows.flatten(), index.flatten()
    found = scores.compute()
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(RetrievalRecall(top_k=k)(*given[:2], indexes=given[2]).item())
    assert found["mrr"] == pytest.approx(RetrievalMRR()(*given[:2], indexes=given[2]).item())
    assert found["ndcg@10"] == pytest.approx(RetrievalNormalizedDCG(top_k=10)(*given[:2], indexes=given[2]).item())
    pairs = torch.tensor([float(queries[q] @ items[i]) for q, i, _ in rows]), torch.tensor([one for *_, one in rows])
    assert found["auc"] == pytest.approx(float(binary_auroc(*pairs)))


def test_embeddings_that_are_all_alike_rank_last() -> None:
    scores = Retrieval().scores(())
    scores.update(SimpleNamespace(logits=torch.ones(8, 2)), batch_of([1, 0, 0, 0], [1] * 4, [1, 2, 3, 4]))
    assert scores.compute()["mrr"] == 0.25


def test_of_a_long_history_the_oldest_go(tokenizer: Any) -> None:
    task = Retrieval(max_length=10)
    found = task.encode({"history": [["abcdef", "uvwxyz"]], "candidate": ["abcdefghijklm"]}, tokenizer, ())
    kept = tokenizer.convert_ids_to_tokens(found["input_ids"][0])
    assert kept == ["[CLS]", "##f", ";", "u", "##v", "##w", "##x", "##y", "##z", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(found["candidate_ids"][0])[1] == "a"
    assert tokenizer.truncation_side == "right"


def test_features_and_batches(setting: Callable[..., Any]) -> None:
    one = setting(task="retrieval")
    batch = one.batch()
    assert batch["input_ids"].shape[0] == 8
    assert batch["labels"].tolist() == [1, 0, 1, 1]
    assert batch["query"][0] == batch["query"][2] != batch["query"][1]
    assert batch["item"][0] == batch["item"][1] != batch["item"][2]
    logits = one.logits()
    assert torch.allclose(logits.norm(dim=-1), torch.ones(8), atol=1e-5)
    assert torch.allclose(logits[4], logits[5], atol=1e-5)  # one text twice


def test_answers_rank_candidates(setting: Callable[..., Any]) -> None:
    one = setting(task="retrieval")
    rows = [
        {"history": ["snow", "ice"], "candidate": ["a wall", "snow; ice", "rime"]},
        {"history": ["snow", "ice"], "candidate": "rime"},
    ]
    with torch.no_grad():
        many, single = one.task.answers(one.model, one.tokenizer, (), rows)
    assert many["ranking"][0] == {"candidate": "snow; ice", "score": 1.0}
    scores = [found["score"] for found in many["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert single["score"] == next(f["score"] for f in many["ranking"] if f["candidate"] == "rime")


@pytest.mark.parametrize(
    "settings", [["compression=[prune/magnitude,quantize/qat]"], ["tuning=lora", "tuning.merge=false"]]
)
def test_a_life(settings: list[str], tmp_path: Path) -> None:
    recipe = recipe_of("retrieval", write_rows(tmp_path)["retrieval"], "trainer=cpu", *settings)
    corpus, work = begin(recipe)
    train(recipe, corpus, work, tmp_path)
    saved = artifact.load(finish(recipe, corpus, work, tmp_path).folder)
    (answer,) = answers(saved, [{"history": ["a"], "candidate": ["b", "c"]}], 4)
    assert len(answer["ranking"]) == 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.temperature=0: needs a number above 0"):
        Retrieval(temperature=0)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"history": ["a"], "candidate": ["b", "c"], "label": 1}) + "\n" for _ in range(4))
    )
    with pytest.raises(DataError, match=r"candidate \['b', 'c'\]: must be one text in a row with a label"):
        begin(recipe_of("retrieval", str(path)))
    with pytest.raises(ConfigError, match=r"task=retrieval: needs the states of one text"):
        begin(recipe_of("retrieval", write_rows(tmp_path)["retrieval"], "model=tiny-t5"))
    taught = ["compression=[distill/logits]", "compression.logits.teacher=t", "compression.logits.cache=true"]
    with pytest.raises(ConfigError, match=r"distill/logits with cache=true and task=retrieval"):
        recipe_of("retrieval", str(path), *taught)
    with pytest.raises(ConfigError, match=r"tuning=head: this model has no head with weights"):
        begin(recipe_of("retrieval", write_rows(tmp_path)["retrieval"], "tuning=head"))
