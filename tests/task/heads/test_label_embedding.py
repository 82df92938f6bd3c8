"""Label embeddings: logits by the formula, the descriptions that vectors begin with, and what a fit does to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from niwaki import artifact, compose
from niwaki.errors import ConfigError
from niwaki.inference import answers
from niwaki.model.load import Pretrained
from niwaki.pipeline import assemble, run
from niwaki.task.descriptions import readable
from niwaki.task.heads.label_embedding import LabelVectors

HEAD = "task.head=label_embedding"


def embedding_by_itself(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """The mean of the last states of one text, of length 1, without padding."""
    with torch.no_grad():
        states = model.base_model(**tokenizer(text, return_tensors="pt"))[0]
    return functional.normalize(states[0].mean(0), dim=-1)


@pytest.mark.parametrize("model", ["tiny-bert", "tiny-llama", "tiny-gpt2", "tiny-albert", "tiny-modernbert"])
def test_logits_are_cosines_with_the_descriptions(begun: Callable[..., Any], model: str) -> None:
    made, corpus, found = begun(HEAD, f"model={model}", "task.temperature=0.1", "task.template='all {} here'")
    assert corpus.labels == ("blue", "green", "red")
    batch = next(iter(corpus.evaluation("test")))  # padded
    assert not bool(batch["attention_mask"].all())
    labels = [embedding_by_itself(found, corpus.tokenizer, f"all {label} here") for label in corpus.labels]
    with torch.no_grad():
        logits = found(**made.task.inputs(batch)).logits
    for ids, mask, ours in zip(batch["input_ids"], batch["attention_mask"], logits, strict=True):
        with torch.no_grad():
            states = found.base_model(input_ids=ids[mask.bool()][None])[0][0]
        text = functional.normalize(states.mean(0), dim=-1)
        assert torch.allclose(ours, torch.stack([text @ label for label in labels]) / 0.1, atol=1e-4)


def test_logits_by_hand() -> None:
    head = LabelVectors(2, 2, temperature=0.5)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0.0], [3.0, 4.0]]))  # of any length
    assert torch.allclose(head(torch.tensor([[0.0, 1.0]])), torch.tensor([[0.0, 1.6]]))


def test_virtual_tokens_are_no_part_of_the_mean(begun: Callable[..., Any]) -> None:
    made, corpus, model = begun(HEAD, "tuning=prompt", "tuning.tokens=3")
    assemble(made, corpus, model)
    batch = made.task.inputs(next(iter(corpus.evaluation("test"))))
    with torch.no_grad():
        states, found = model.base_model(**batch)[0], model(**batch)
    assert states.shape[1] == batch["input_ids"].shape[1]
    row = int(batch["attention_mask"].sum(1).argmin())
    mean = states[row, : int(batch["attention_mask"][row].sum())].mean(0)
    assert torch.allclose(found.embedding[row], functional.normalize(mean, dim=-1), atol=1e-5)


@pytest.mark.parametrize(
    ("label", "words"),
    [("card_arrival", "card arrival"), ("Sci/Tech", "Sci Tech"), ("topUpFailed", "top Up Failed"), ("C-3_p", "C 3 p")],
)
def test_names_made_readable(label: str, words: str) -> None:
    assert readable(label) == words


def test_descriptions_stand_for_names(begun: Callable[..., Any]) -> None:
    _, corpus, model = begun(HEAD, "task.descriptions={green: the colour of grass}")
    expected = embedding_by_itself(model, corpus.tokenizer, "This is about the colour of grass.")
    assert torch.allclose(model.head.weight[corpus.labels.index("green")], expected, atol=1e-5)


def test_without_a_row_the_artifact_says_what_the_descriptions_say(recipe: Callable[..., Any], tmp_path: Path) -> None:
    made = recipe(HEAD, "data.shots=0", "measure=full", "measure.repeats=0")
    metrics = run(made, tmp_path, {})
    assert metrics["steps"] == 0
    assert metrics["after"]["test"] == metrics["before"]["test"]
    saved = artifact.load(tmp_path / "model")
    assert saved.labels == ("blue", "green", "red")
    (answer,) = answers(saved, [{"text": "This is about red."}], 1)
    assert answer["label"] == "red"


def test_what_was_tuned_is_kept_by_the_next_run(recipe: Callable[..., Any], tmp_path: Path) -> None:
    made = recipe(HEAD, "optimizer.lr=1e-2")
    (tmp_path / "one").mkdir()
    run(made, tmp_path / "one", {})
    tuned = artifact.load(tmp_path / "one" / "model").model.head.weight
    again = Pretrained(name=str(tmp_path / "one"))
    model = again.load(made.task, ("blue", "green", "red"), 0)
    assert not model.head_is_new
    made.task.begin(model, None)  # reads nothing
    assert torch.equal(model.head.weight, tuned)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["task.descriptions={gren: x}"],
            r"descriptions\.gren: the data has no such label; did you mean 'green'",
        ),
        (["task.template=about"], r"task\.template='about': needs \{\} once"),
        (["task.temperature=0"], r"task\.temperature=0.*above 0"),
        (["task.pairs=3"], r"task\.pairs=3: head=label_embedding has no such setting.*contrastive"),
        (["model=tiny-t5"], r"task\.head=label_embedding: needs the states of one text"),
        (["export=[hf]"], r"export=hf: this head is niwaki's own"),
    ],
)
def test_refusals(begun: Callable[..., Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun(HEAD, *overrides)


def test_labels_without_a_word_need_descriptions(tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    files = [f"data.{split}={path}" for split in ("train", "validation", "test")]
    recipe = compose.build(compose.compose([HEAD, "model=tiny-bert", "data=files", *files]).config)
    with pytest.raises(ConfigError, match=r"the label '0' has no word in it"):
        recipe.task.labels(recipe.data.splits(recipe.task.needs, 0))
