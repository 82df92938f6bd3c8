"""Causal language modelling: every token but the first predicted once; the perplexity of plain arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from niwaki.errors import ConfigError, DataError
from niwaki.task import causal_lm
from niwaki.task.causal_lm import CausalLM, aligned, documents
from niwaki.task.task import IGNORED, Task

TEXTS = ["a tree in the garden", "cut with care, and wait for the spring"]


@pytest.mark.parametrize("max_length", [4, 5, 7, 16, 300])
def test_every_token_but_the_first_is_predicted_exactly_once(setting: Callable[..., Any], max_length: int) -> None:
    one = setting("llama", "causal_lm")
    one.task = CausalLM(max_length=max_length)
    separator = one.tokenizer.bos_token_id
    stream = []
    for text in TEXTS:
        stream += [separator, *one.tokenizer(text, add_special_tokens=False)["input_ids"]]
    batch = one.batch({"text": TEXTS})
    assert max(len(row["input_ids"]) for row in one.features({"text": TEXTS})) <= max_length
    _, targets = one.task.counted(SimpleNamespace(logits=torch.zeros(*batch["labels"].shape, 1)), batch)
    assert targets.tolist() == stream[1:]


def test_blocks_overlap_by_one_token(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    one.task = CausalLM(max_length=6)
    blocks = [row["input_ids"] for row in one.features({"text": TEXTS})]
    assert all(first[-1] == second[0] for first, second in itertools.pairwise(blocks))
    assert [len(block) for block in blocks[:-1]] == [6] * (len(blocks) - 1)
    assert len(blocks[-1]) >= 2


def test_each_prediction_is_made_from_the_tokens_before(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    batch = one.batch()
    outputs = SimpleNamespace(logits=torch.arange(batch["labels"].numel()).view(*batch["labels"].shape, 1))
    positions, targets = one.task.counted(outputs, batch)
    for position, target in zip(positions[:, 0].tolist(), targets.tolist(), strict=True):
        row, column = divmod(position, batch["labels"].shape[1])
        assert batch["input_ids"][row, column + 1] == target


def test_the_perplexity_is_that_of_an_independent_mean(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    for parameter in one.model.parameters():
        parameter.data *= 3
    total, count = 0.0, 0
    with torch.no_grad():
        for row in one.features():  # block by block, without padding
            ids = row["input_ids"]
            chances = one.model(torch.tensor([ids])).logits[0].double().softmax(-1)
            total -= sum(math.log(float(chances[t, ids[t + 1]])) for t in range(len(ids) - 1))
            count += len(ids) - 1
    scores = one.task.scores(())
    batch = one.batch()
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        for part in (slice(0, 1), slice(1, None)):
            piece = {name: tensor[part] for name, tensor in batch.items()}
            scores.update(one.model(**one.task.inputs(piece)), piece)
    found = scores.compute()
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    scores = CausalLM().scores(())
    scores.update(SimpleNamespace(logits=torch.zeros(1, 4, 50)), {"labels": torch.tensor([[1, 2, 3, IGNORED]])})
    assert scores.compute()["perplexity"] == pytest.approx(50, rel=1e-5)


def test_a_hopeless_loss_is_still_a_number() -> None:
    scores = CausalLM().scores(())
    scores.update(SimpleNamespace(logits=torch.tensor([[[1e4, 0.0], [0.0, 0.0]]])), {"labels": torch.tensor([[0, 1]])})
    assert math.isfinite(scores.compute()["perplexity"])


def test_rows_that_end_with_a_line_break_run_on() -> None:
    assert documents(["a\n", "b\n", "c"]) == ["a\nb\nc"]
    assert documents(["a", "b\n", "c\n"]) == ["a", "b\nc\n"]
    assert documents(["a\r\n", "", "b"]) == ["a\r\n", "b"]
    assert documents(["a", "b"]) == ["a", "b"]
    assert documents([]) == []


def test_a_separator_stands_before_every_document(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    (row,) = one.features({"text": ["ab", "c\n", "d"]})
    assert one.tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "a", "##b", "[CLS]", "c", "d"]


def test_what_is_generated_is_the_greedy_continuation(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm")
    one.task = CausalLM(max_new_tokens=5)
    rows = [{"text": "A Tree"}]  # the tokenizer lowers it
    with torch.no_grad():
        (answer,) = one.task.answers(one.model, one.tokenizer, (), rows)
        prompt = one.tokenizer("A Tree", add_special_tokens=False)["input_ids"]
        ids = [one.tokenizer.bos_token_id, *prompt]
        for _ in range(5):
            ids.append(int(one.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == one.tokenizer.eos_token_id:
                break
    written = ids[1 + len(prompt) :]
    assert answer == {"text": "A Tree", "generated": one.tokenizer.decode(written, skip_special_tokens=True)}


def test_refusal() -> None:
    with pytest.raises(ConfigError, match=r"^task\.max_new_tokens=0"):
        CausalLM(max_new_tokens=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_what_counts_without_picking_it(
    setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, smoothing: float
) -> None:
    one = setting("llama", "causal_lm")
    batch = one.batch()
    assert not batch["attention_mask"].all()
    outputs = SimpleNamespace(logits=torch.randn(*batch["labels"].shape, len(one.tokenizer)) * 3)
    picked = Task.loss(one.task, outputs, batch, smoothing=smoothing)
    monkeypatch.setattr(CausalLM, "counted", lambda *_: pytest.fail("the logits were copied"))
    assert one.task.loss(outputs, batch, smoothing=smoothing).item() == pytest.approx(picked.item(), abs=1e-6)
    one.task.scores(()).update(outputs, batch)
    assert aligned(outputs, batch)[0].data_ptr() == outputs.logits.data_ptr()


def test_documents_are_tokenised_together(setting: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = setting("llama", "causal_lm")
    texts = ["a tree", "in", "the garden", "cut it\n", "with care"]
    alone = [t for text in documents(texts) for t in (2, *one.tokenizer(text, add_special_tokens=False)["input_ids"])]
    calls: list[list[str]] = []

    class Counting:
        bos_token_id = one.tokenizer.bos_token_id

        def __call__(self, texts: list[str], **settings: Any) -> Any:
            calls.append(texts)
            return one.tokenizer(texts, **settings)

    monkeypatch.setattr(causal_lm, "DOCUMENTS_AT_ONCE", 3)
    assert CausalLM(max_length=100).encode({"text": texts}, Counting(), ())["input_ids"] == [alone]
    assert calls == [["a tree", "in", "the garden"], ["cut it\nwith care"]]


def test_a_text_that_leaves_no_room_is_refused(setting: Callable[..., Any]) -> None:
    one = setting("llama", "causal_lm", overrides={"max_position_embeddings": 16})
    one.task = CausalLM(max_length=8, max_new_tokens=6)
    with torch.no_grad():
        list(one.task.answers(one.model, one.tokenizer, (), [{"text": "a" * 9}]))
        with pytest.raises(DataError, match=r"^text 'a{10}': its 11 tokens and the 6 to write .* than the 16 that"):
            list(one.task.answers(one.model, one.tokenizer, (), [{"text": "a" * 10}]))
