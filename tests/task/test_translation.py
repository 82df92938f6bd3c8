"""Translation: the decoder reads the targets one place later, the loss is plain arithmetic, answers are what was
searched, scores are sacrebleu's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sacrebleu
import torch
from transformers import AutoTokenizer

from niwaki import artifact, compose
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import DECODER_START, Pretrained
from niwaki.model.text import in_decoder, text_of
from niwaki.pipeline import read
from niwaki.task.layout import told
from niwaki.task.task import IGNORED, until_end
from niwaki.task.translation import Translation, TranslationScores

FAMILIES = ["bart", "t5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_reads_as_the_model_itself_would_shift(setting: Callable[..., Any], family: str) -> None:
    one = setting(family, "translation")
    batch = one.batch()
    own = one.model.prepare_decoder_input_ids_from_labels(batch["labels"])
    counted = batch["labels"] != IGNORED
    assert torch.equal(batch["decoder_input_ids"][counted], own[counted])
    with torch.no_grad():
        ours = one.model(**one.task.inputs(batch)).logits
        theirs = one.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(ours[counted], theirs.logits[counted])
    assert one.task.loss(SimpleNamespace(logits=ours), batch).item() == pytest.approx(theirs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_whole_and_end(setting: Callable[..., Any], family: str) -> None:
    one = setting(family, "translation")
    rows = one.features()
    end = one.tokenizer.eos_token_id
    assert [row["labels"][-1] for row in rows] == [end] * 3
    assert [bytes(row["reference"]).decode() for row in rows] == one.rows["target"]
    one.task = Translation(max_length=32, max_target_length=4)
    assert all(len(row["labels"]) <= 4 and row["labels"][-1] == end for row in one.features())


def test_the_start_token_is_in_the_files_of_the_tokenizer(setting: Callable[..., Any], tmp_path: Any) -> None:
    one = setting("t5", "translation")
    one.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).init_kwargs[DECODER_START] == "[PAD]"


def test_what_stands_behind_the_first_end_was_not_written() -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 9]))
    written = torch.tensor([[5, 3, 3, 7], [5, 6, 7, 8], [9, 5, 3, 0]])
    assert until_end(written, model).tolist() == [[5, 3, *[IGNORED] * 2], [5, 6, 7, 8], [9, *[IGNORED] * 3]]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_search_row_by_row(setting: Callable[..., Any], family: str, num_beams: int) -> None:
    one = setting(family, "translation")
    for parameter in one.model.parameters():
        parameter.data *= 2
    batch = one.batch()
    assert not batch["attention_mask"].all()
    written = one.task.write(one.model.eval(), batch, num_beams=num_beams)
    for number, row in enumerate(one.features()):
        alone = one.model.generate(torch.tensor([row["input_ids"]]), num_beams=num_beams, max_new_tokens=16)[0, 1:]
        mine = [token for token in written[number].tolist() if token != IGNORED]
        assert mine == alone.tolist()[: len(mine)]
        assert len(mine) == 16 or mine[-1] == one.tokenizer.eos_token_id


def test_greedy_answers_are_the_likeliest_tokens(setting: Callable[..., Any]) -> None:
    one = setting("bart", "translation")
    batch = one.batch()
    written = one.task.write(one.model.eval(), batch, num_beams=1)
    retold = one.task.retold(batch, written)
    with torch.no_grad():
        likeliest = one.model(**one.task.inputs(retold)).logits.argmax(-1)
    counted = written != IGNORED
    assert torch.equal(likeliest[counted], written[counted])


def test_scores_are_those_of_sacrebleu_and_of_hand(setting: Callable[..., Any]) -> None:
    tokenizer = setting("bart", "translation").tokenizer
    pairs = [
        ("the cat sat on the mat", "the cat sat on a mat"),
        ("abcd", "abed"),
        ("same words here", "same words here"),
    ]
    scores = TranslationScores(tokenizer)
    batch = {"labels": torch.tensor([[1, 2, IGNORED]])}
    scores.update(SimpleNamespace(logits=torch.zeros(1, 3, 50)), batch)
    tokens = [tokenizer(one)["input_ids"] for one, _ in pairs]
    width = max(map(len, tokens))
    references = [list(other.encode()) for _, other in pairs]
    longest = max(map(len, references))
    scores.compare(
        torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in tokens]),
        torch.tensor([[*row, *[0] * (longest - len(row))] for row in references]),
    )
    assert scores.written == [one for one, _ in pairs]
    assert scores.references == [[other] for _, other in pairs]
    found = scores.compute()
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(scores.written, scores.streams).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(scores.written, scores.streams).score)
    assert found["cer"] == pytest.approx((3 + 1) / (20 + 4 + 15))
    assert found["exact"] == pytest.approx(1 / 3)
    assert found["loss"] == pytest.approx(math.log(50))
    assert "version:" in scores.report()["signatures"]["bleu"]


def test_a_decoder_has_padding_of_its_own(setting: Callable[..., Any]) -> None:
    one = setting("bart", "translation")
    batch, anatomy = one.batch(), Anatomy.of(one.model)
    assert torch.equal(text_of(batch, decoder=True), batch["labels"] != IGNORED)
    assert torch.equal(text_of(batch), batch["attention_mask"].bool())
    shapes: dict[str, int] = {}
    for name, linear in anatomy.linears().items():
        linear.register_forward_hook(lambda _, given, __, name=name: shapes.update({name: given[0].shape[1]}))  # type: ignore[misc]
    one.model(**one.task.inputs(batch))
    assert batch["input_ids"].shape[1] != batch["labels"].shape[1]
    for name, length in shapes.items():
        assert length == text_of(batch, in_decoder(anatomy, name)).shape[1], name


def test_padding_of_the_decoder_changes_no_importance(setting: Callable[..., Any]) -> None:
    from niwaki.compression.prune.importance import measure
    from niwaki.model.units import units_of

    one = setting("bart", "translation")
    units = list(units_of(Anatomy.of(one.model), "neurons"))
    found = []
    for extra in (0, 7):
        batch = one.batch()
        labels = torch.nn.functional.pad(batch["labels"], (0, extra), value=IGNORED)
        batch |= told(labels, batch["decoder_input_ids"][:, :1])
        context = one.context()
        context.calibration = lambda _, batch=batch: [batch]
        found.append(measure(one.model, units, "activation", 4, context))
    for short, long in zip(*found, strict=True):
        torch.testing.assert_close(short, long)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.num_beams=0", "task.num_beams=0: needs a whole number of at least 1"),
        ("task.max_target_length=2", "task.max_target_length=2: needs a whole number of at least 4"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose.build(compose.compose(["task=translation", "model=tiny-bart", setting]).config)


def test_a_model_without_a_decoder_is_refused(setting: Callable[..., Any]) -> None:
    from niwaki.model.tiny import Tiny

    with pytest.raises(ConfigError, match="task=translation: needs a model that writes, and bert sees the whole text"):
        Tiny(name="bert").empty(Translation(), ())
    with pytest.raises(ConfigError, match=r"task\.max_target_length=600: the model writes at most 512 tokens"):
        Translation(max_target_length=600).check(Anatomy.of(setting("bart", "translation").model))


def test_predict_writes(setting: Callable[..., Any]) -> None:
    one = setting("t5", "translation")
    found = list(one.task.answers(one.model.eval(), one.tokenizer, (), [{"source": "one"}, {"source": "two words"}]))
    assert [row["source"] for row in found] == ["one", "two words"]
    assert all(isinstance(row["generated"], str) for row in found)
    json.dumps(found)


def test_a_config_without_a_start_is_refused(setting: Callable[..., Any]) -> None:
    one = setting("t5", "translation")
    one.model.config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match=r"^task=translation: the config of this t5 names no decoder_start"):
        one.task.check(Anatomy.of(one.model))


def test_tokens_of_the_targets_count(tmp_path: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"source": "aaa", "target": "zzz"}) + "\n" for _ in range(6)))
    data = [f"data.{split}={rows}" for split in ("train", "validation", "test")]
    recipe = compose.build(compose.compose(["task=translation", "model=tiny-bart", "data=files", *data]).config)
    corpus = read(recipe)
    known = corpus.tokenizer.get_vocab()
    counts = corpus.token_counts(["train"])
    assert counts[known["a"]] == counts[known["z"]] == 6


def test_a_run_that_starts_from_a_run_searches_as_it_did(setting: Callable[..., Any], tmp_path: Any) -> None:
    one = setting("bart", "translation")
    one.model.generation_config.no_repeat_ngram_size = 3
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=(),
        base_config=one.model.config.to_dict(), edits=[],
    )  # fmt: skip
    again = Pretrained(name=str(tmp_path / "model")).load(one.task, (), seed=0)
    assert again.generation_config.no_repeat_ngram_size == 3
