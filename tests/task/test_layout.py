"""One decoder for source and target: only targets count, and texts written in batches are those written alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from written import batch_of, features, tiny, without_padding

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import DECODER_START, fitted
from niwaki.model.tiny import Tiny
from niwaki.task.layout import CROSSED, IN_LINE, end_of, layout_for, layout_of
from niwaki.task.task import IGNORED
from niwaki.task.translation import Translation

ROWS = {"source": ["one", "twenty two", "three hundred"], "target": ["1", "22", "300"]}
DECODERS = ["llama", "gpt2", "qwen3"]


def task(**settings: Any) -> Translation:
    return Translation(**{"max_length": 32, "max_target_length": 16, **settings})


def test_a_tokenizer_tells_which_layout() -> None:
    assert [layout_for(Tiny(name=name).tokenizer()) for name in ("bart", "t5", "llama")] == [CROSSED, CROSSED, IN_LINE]
    moved = fitted(Tiny(name="bart").tokenizer(), Tiny(name="llama").config())  # which came from another model
    assert DECODER_START not in moved.init_kwargs


@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_is_of_the_targets_alone(family: str) -> None:
    """Row by row, in plain arithmetic: -log p of each token of the target and of its end."""
    model, tokenizer = tiny(family, task())
    batch = batch_of(task(), tokenizer, ROWS)
    total, count = 0.0, 0
    for source, target in zip(ROWS["source"], ROWS["target"], strict=True):
        before = [
            tokenizer.bos_token_id,
            *tokenizer(source, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        answer = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([before + answer])).logits[0]
        for place, token in enumerate(answer, start=len(before)):
            total -= functional.log_softmax(logits[place - 1], -1)[token].item()
            count += 1
    with torch.no_grad():
        outputs = model(**task().inputs(batch))
    assert task().loss(outputs, batch).item() == pytest.approx(total / count, rel=1e-5)
    counted, labels = task().counted(outputs, batch)
    assert len(counted) == len(labels) == count
    scores = task().scores((), tokenizer)
    scores.update(outputs, batch)
    scores.compare(batch["labels"], batch["reference"])
    assert scores.compute()["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_separator_stands_between() -> None:
    _, tokenizer = tiny("llama", task())
    for separator, between in ((" => ", ["=", ">"]), (None, ["[SEP]"])):
        ids = features(task(separator=separator), tokenizer, ROWS)[0]["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "o", "##n", "##e", *between]
    long = features(task(max_length=6, separator="=>"), tokenizer, {"source": ["abcdefgh"], "target": ["1"]})[0]
    assert tokenizer.convert_ids_to_tokens(long["input_ids"])[-2:] == ["=", ">"]
    assert len(long["input_ids"]) == 6


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_texts_of_a_batch_are_those_of_its_rows(family: str, num_beams: int, settings: dict[str, Any]) -> None:
    one = task(**settings)
    model, tokenizer = tiny(family, one, scale=3.0)
    rows = features(one, tokenizer, ROWS)
    lengths = {len(row["input_ids"]) for row in rows}
    assert len(lengths) == 3
    written = without_padding(one.write(model, one.collate(rows, tokenizer), num_beams=num_beams))
    for row, mine in zip(rows, written, strict=True):
        alone = model.generate(
            torch.tensor([row["input_ids"]]), num_beams=num_beams, max_new_tokens=16, do_sample=False, **settings
        )[0, len(row["input_ids"]) :].tolist()
        assert mine == alone[: len(mine)]
        assert len(mine) == 16 or mine[-1] == tokenizer.eos_token_id
    assert len({tuple(one) for one in written}) > 1


def test_prefix_and_virtual_tokens_mind_no_padding() -> None:
    from niwaki.tuning.virtual import add_prompt

    model, tokenizer = tiny("llama", task(), scale=3.0)
    add_prompt(model, Anatomy.of(model), 4)
    torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "prompt" in name or p.shape == (4, 32)))
    rows = features(task(), tokenizer, ROWS)
    written = without_padding(task().write(model, task().collate(rows, tokenizer), num_beams=1))
    for row, mine in zip(rows, written, strict=True):
        assert without_padding(task().write(model, task().collate([row], tokenizer), num_beams=1)) == [mine]


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_what_was_written_is_what_is_learned_then(family: str) -> None:
    model, tokenizer = tiny(family, task(), scale=3.0)
    batch = batch_of(task(), tokenizer, ROWS)
    written = task().write(model, batch, num_beams=1)
    retold = task().retold(batch, written)
    with torch.no_grad():
        logits, labels = task().counted(model(**task().inputs(retold)), retold)
    assert labels.tolist() == written[written != IGNORED].tolist()
    assert torch.equal(logits.argmax(-1), labels)
    assert layout_of(retold) is layout_of(batch)


def test_an_end_token_of_the_tokenizer_ends_a_text() -> None:
    """Also where the model's own settings name another."""
    model, tokenizer = tiny("llama", task())
    model.generation_config.eos_token_id = 77
    batch = batch_of(task(), tokenizer, ROWS)
    seen: dict[str, Any] = {}
    own = model.generate
    model.generate = lambda **given: seen.update(given) or own(**given)
    task().write(model, batch, num_beams=1)
    assert sorted(seen["eos_token_id"]) == [tokenizer.eos_token_id, 77]


def test_what_does_not_fit_is_refused() -> None:
    model, _ = tiny("llama", task())
    with pytest.raises(ConfigError, match=r"max_length=1900 and max_target_length=200: a decoder reads both in a row"):
        task(max_length=1900, max_target_length=200).check(Anatomy.of(model))
    with pytest.raises(ConfigError, match="what stands around a source takes all of it"):
        features(task(max_length=4, separator="====="), Tiny(name="llama").tokenizer(), ROWS)
    with pytest.raises(ConfigError, match="'some/model' has no end token"):
        end_of(SimpleNamespace(eos_token_id=None, name_or_path="some/model"))
