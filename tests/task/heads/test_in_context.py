"""Demonstrations in context: which rows, what is read, the calibration by hand, and what a reload keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.inference import answers
from niwaki.model.anatomy import Anatomy
from niwaki.pipeline import judge, run

HEAD = [
    "task.head=in_context",
    "task.verbalizer={red: r, green: g, blue: b}",
    "model=tiny-llama",
    "trainer.max_epochs=0",
]


def asked(tokenizer: Any, texts: list[tuple[str, str | None]]) -> torch.Tensor:
    """The whole prompt as one text: (1, tokens)."""
    whole = " ".join(f"Text: {text} Topic: {word or ''}" for text, word in texts)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer.bos_token_id, *ids]])


def test_what_is_read_and_the_calibration_by_hand(begun: Callable[..., Any]) -> None:
    made, corpus, model = begun(*HEAD, "task.demonstrations=3")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)  # the output's too: it is surer then
    made.task.begin(model, corpus)
    chosen = made.task.chosen.drawn(corpus)
    assert sorted(row["label"] for row in chosen) == ["blue", "green", "red"]
    shown = [(row["text"], row["label"][0]) for row in chosen]
    reference = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    reference.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("words.")})
    tokens = corpus.tokenizer.convert_tokens_to_ids(["b", "g", "r"])

    def chances(text: str) -> torch.Tensor:
        with torch.no_grad():
            logits = reference(asked(corpus.tokenizer, [*shown, (text, None)])).logits[0, -1, tokens]
        return logits.softmax(-1)

    free = torch.stack([chances(text) for text in ("N/A", "[MASK]", "")]).mean(0)
    assert float(free.max()) > 0.5
    batch = next(iter(corpus.evaluation("test")))
    with torch.no_grad():
        found = model(**made.task.inputs(batch)).logits.softmax(-1)
    longest_first = sorted(range(8), key=lambda row: -corpus.features["test"][row]["length"])
    for row, ours in zip(longest_first, found, strict=True):
        weighed = chances(corpus.rows["test"]["text"][row]) / free  # W p, with W = diag(p_cf)^-1
        assert torch.allclose(ours, weighed / weighed.sum(), atol=1e-5)


def test_without_calibration_it_says_what_the_model_says(begun: Callable[..., Any]) -> None:
    made, corpus, model = begun(*HEAD, "task.calibrate=false", "task.demonstrations=0", "data.shots=0")
    assert model.words.prefix.tolist() == [corpus.tokenizer.bos_token_id]
    assert not bool(model.words.content_free.any())
    batch = made.task.inputs(next(iter(corpus.evaluation("test"))))
    text = batch["input_ids"][0][None]
    with torch.no_grad():
        ours = model(input_ids=text).logits
        whole = type(model).forward(model, input_ids=torch.cat([model.words.prefix[None], text], 1)).logits
    assert torch.allclose(ours, whole[:, -1, model.words.tokens].log_softmax(-1), atol=1e-5)


def test_demonstrations_are_drawn_by_the_seed_and_balanced(begun: Callable[..., Any]) -> None:
    made, corpus, _ = begun(*HEAD, "task.demonstrations=5", "task.max_length=24")
    texts = [row["text"] for row in made.task.chosen.drawn(corpus)]
    assert texts == [row["text"] for row in made.task.chosen.drawn(corpus)]
    other, of_other, _ = begun(*HEAD, "task.demonstrations=5", "task.max_length=24", "seed=1")
    assert texts != [row["text"] for row in other.task.chosen.drawn(of_other)]
    assert len(set(texts)) == 5
    counts = Counter(row["label"] for row in made.task.chosen.drawn(corpus))
    assert sorted(counts.values()) == [1, 2, 2]


def test_the_oldest_go_where_there_is_no_room(begun: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    whole = begun(*HEAD, "task.demonstrations=3")[2].words.prefix.tolist()
    room = len(whole) + 48 - 1
    cut = begun(*HEAD, "task.demonstrations=3", f"model.overrides={{max_position_embeddings:{room}}}")[2].words.prefix
    assert "2 of 3 demonstrations fit" in capsys.readouterr().err
    assert 1 < len(cut) < len(whole)
    assert whole[-len(cut) + 1 :] == cut.tolist()[1:]


def test_demonstrations_are_part_of_the_artifact(recipe: Callable[..., Any], tmp_path: Path) -> None:
    made = recipe(*HEAD, "compression=[quantize/int8]")
    metrics = run(made, tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    assert len(saved.model.words.prefix) > 40
    assert metrics["parity"] == 0
    assert Anatomy.of(saved.model).positions == saved.model.config.max_position_embeddings - len(
        saved.model.words.prefix
    )
    (answer,) = answers(saved, [{"text": "blue"}], 1)
    assert answer["label"] in saved.labels


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_epochs=1"], r"trainer\.max_epochs=1 and task\.head=in_context: nothing is tuned; set it to 0"),
        (["data.shots=0"], r"data\.shots=0: task\.head=in_context demonstrates training rows"),
        (["model=tiny-bert"], r"needs a model that reads from left to right, and bert sees the whole text"),
        (["task.demonstrations=-1"], r"task\.demonstrations=-1: needs a whole number of at least 0"),
    ],
)
def test_refusals(begun: Callable[..., Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun(*HEAD, *overrides)


def test_the_calibration_is_of_the_compressed_model(recipe: Callable[..., Any], tmp_path: Path) -> None:
    settings = [
        "compression=quantize/weight_only",
        "compression.weight_only.bits=2",
        "compression.weight_only.group=16",
    ]
    made = recipe(*HEAD, "trainer.max_steps=null", *settings)
    run(made, tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    stored = saved.model.words.content_free.clone()
    corpus, _ = judge(made)
    made.task.refit(saved.model, corpus)
    assert torch.allclose(saved.model.words.content_free, stored, atol=1e-3)
    assert stored.abs().max() > 0.01
