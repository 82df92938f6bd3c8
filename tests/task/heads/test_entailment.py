"""Entailment: logits of pairs as the model has them, whatever its labels are called and ordered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from niwaki.errors import ConfigError
from niwaki.model.text import text_of

HEAD = "task.head=entailment"
NLI = "model.overrides={id2label:{0:neutral,1:Contradiction,2:ENTAILMENT}}"


@pytest.mark.parametrize(("against", "places"), [("false", (2, None)), ("true", (2, 1))])
def test_logits_are_those_of_each_pair(begun: Callable[..., Any], against: str, places: tuple[int, int | None]) -> None:
    made, corpus, model = begun(HEAD, NLI, f"task.against_contradiction={against}", "task.template='it is {}'")
    reference = transformers.AutoModelForSequenceClassification.from_config(model.config).eval()
    reference.load_state_dict(model.state_dict())
    batch = next(iter(corpus.evaluation("test")))
    assert batch["input_ids"].shape[:2] == (8, 3)
    with torch.no_grad():
        ours = model(**made.task.inputs(batch)).logits
    longest_first = sorted(corpus.features["test"], key=lambda row: -row["length"])
    texts = {
        tuple(map(tuple, row["input_ids"])): text
        for row, text in zip(corpus.features["test"], corpus.rows["test"]["text"][:], strict=True)
    }
    for row, found in zip(longest_first, ours, strict=True):
        text = texts[tuple(map(tuple, row["input_ids"]))]
        for label, logit in zip(corpus.labels, found, strict=True):
            with torch.no_grad():
                pair = corpus.tokenizer(text, f"it is {label}", return_tensors="pt")
                logits = reference(**pair).logits[0]
            expected = logits[places[0]] - (0 if places[1] is None else logits[places[1]])
            assert logit.item() == pytest.approx(expected.item(), abs=1e-5)


def test_only_the_text_is_cut(begun: Callable[..., Any]) -> None:
    """Though the hypothesis is the longer one in the end."""
    long = "task.template='it is so very certainly and clearly {}'"
    corpus, whole = (begun(HEAD, NLI, f"task.max_length={most}", long)[1] for most in (48, 99))
    row = max(range(8), key=lambda i: whole.features["test"]["length"][i])
    for cut, ids in zip(
        corpus.features["test"][row]["input_ids"], whole.features["test"][row]["input_ids"], strict=True
    ):
        assert len(cut) == 48 < len(ids)
        hypothesis = ids[ids.index(corpus.tokenizer.sep_token_id) :]
        assert cut[-len(hypothesis) :] == hypothesis


def test_the_text_of_several_texts_a_row(begun: Callable[..., Any]) -> None:
    """As what flows through the model has it: each text by itself."""
    _, corpus, model = begun(HEAD, NLI)
    batch = next(iter(corpus.evaluation("test")))
    with torch.no_grad():
        states = model.base_model(batch["input_ids"].flatten(0, 1))[0]
    assert text_of(batch).shape == states.shape[:2]
    assert int(text_of(batch).sum()) == int(batch["attention_mask"].sum())
    assert corpus.token_counts(["test"]).sum() == int(batch["attention_mask"].sum())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"needs a model of natural language inference, with a label 'entailment'; this bert has LABEL_0, LABEL_1"),
        (
            ["model.overrides={id2label:{0:entailment,1:other}}", "task.against_contradiction=true"],
            r"with a label 'contradiction'; this bert has entailment, other",
        ),
        ([NLI, "export=[hf]"], r"export=hf: this head is niwaki's own"),
        ([NLI, "task.max_length=8"], r"task\.max_length=8: leaves no room for a text beside a hypothesis"),
        ([NLI, "task.template='is'"], r"task\.template='is': needs \{\} once"),
    ],
)
def test_refusals(begun: Callable[..., Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun(HEAD, *overrides)
