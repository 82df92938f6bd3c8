"""Masked language modelling: what is hidden, how often and when; its loss and scores by plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lifecycle import begin, finish, recipe_of, train, write_rows
from transformers import DataCollatorForLanguageModeling

from niwaki import artifact, inference
from niwaki.data.batches import Batches
from niwaki.data.corpus import Corpus
from niwaki.data.files import Files
from niwaki.errors import ConfigError, DataError
from niwaki.model.load import Pretrained
from niwaki.model.teacher import loaded
from niwaki.model.tiny import Tiny
from niwaki.stage import Context
from niwaki.task.masked_lm import MaskedLM, replaced
from niwaki.task.task import IGNORED
from niwaki.tuning.adapter import Houlsby
from niwaki.tuning.lora import LoRA

TEXTS = ["a tree in the garden", "cut with care, and wait for the spring"]
WORDS = ["rose", "garden", "tree", "a", "of", "spring", "wire", "pond", "3", "cut"]


def text(words: int, seed: int = 0) -> str:
    """Words in a random order."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=words))


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: Any) -> Callable[..., Corpus]:
    """`corpus(seed, workers)`: some sixty blocks of text in each split."""
    (tmp_path / "rows.txt").write_text("\n".join(text(12, seed) for seed in range(40)))
    file = str(tmp_path / "rows.txt")

    def read(seed: int = 0, workers: int = 0) -> Corpus:
        source = Files(train=file, validation=file, test=file, batch_size=8, workers=workers)
        return Corpus.read(MaskedLM(max_length=32), source, tokenizer, seed)

    return read


def blocks_of(task: MaskedLM, texts: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    columns = task.encode({"text": texts}, tokenizer, ())
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def original(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens before some were hidden."""
    return torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])


@pytest.mark.parametrize("max_length", [4, 5, 7, 16, 300])
def test_blocks_hold_the_text_once_between_special_tokens(tokenizer: Any, max_length: int) -> None:
    first, second = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in TEXTS)
    blocks = [row["input_ids"] for row in blocks_of(MaskedLM(max_length=max_length), TEXTS, tokenizer)]
    assert [token for block in blocks for token in block[1:-1]] == [*first, tokenizer.sep_token_id, *second]
    assert {block[0] for block in blocks} == {tokenizer.cls_token_id}
    assert {block[-1] for block in blocks} == {tokenizer.sep_token_id}
    assert {len(block) for block in blocks[:-1]} <= {max_length}
    assert 3 <= len(blocks[-1]) <= max_length


def test_a_block_is_built_as_the_tokenizer_builds_a_text(tokenizer: Any) -> None:
    (row,) = blocks_of(MaskedLM(), TEXTS[:1], tokenizer)
    assert row["input_ids"] == tokenizer(TEXTS[0])["input_ids"]


def test_special_tokens_are_never_chosen(tokenizer: Any) -> None:
    task = MaskedLM(max_length=64, mask_share=0.9)
    batch = task.collate(
        blocks_of(task, [f"{text(9, i)} [SEP] 字 [CLS] [MASK]" for i in range(40)], tokenizer), tokenizer
    )
    chosen = set(batch["labels"][batch["labels"] != IGNORED].tolist())
    special = set(tokenizer.all_special_ids)
    assert len(chosen) > 10
    assert not chosen & special
    assert special <= set(original(batch).flatten().tolist())


def test_the_shares_are_those_of_the_paper(tokenizer: Any) -> None:
    """0.15 of the tokens; of these 0.8, 0.1 and 0.1, as another implementation draws them."""
    task = MaskedLM(max_length=128)
    rows = blocks_of(task, [text(30, seed) for seed in range(400)], tokenizer)
    ours = task.collate(rows, tokenizer)
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)(
        [{"input_ids": row["input_ids"]} for row in rows]
    )
    found = []
    for batch in (ours, theirs):
        plain, chosen = original(batch), batch["labels"] != IGNORED
        text_alone = ~torch.isin(plain, torch.tensor(tokenizer.all_special_ids))
        now, then = batch["input_ids"][chosen], plain[chosen]
        masked = now == tokenizer.mask_token_id
        found.append(
            [
                float(chosen.sum() / text_alone.sum()), float(masked.float().mean()),
                float(((now != then) & ~masked).float().mean()), float((now == then).float().mean()),
            ]
        )  # fmt: skip
        assert torch.equal(plain, original(ours))
    assert int((ours["labels"] != IGNORED).sum()) > 5000
    assert found[0] == pytest.approx([0.15, 0.8, 0.1, 0.1], abs=0.015)
    assert found[0] == pytest.approx(found[1], abs=0.02)


@pytest.mark.parametrize(("share", "tokens", "chosen"), [(0.15, 20, 3), (0.15, 2, 1), (0.5, 9, 4), (0.01, 30, 1)])
def test_each_block_has_so_many_that_are_predicted(tokenizer: Any, share: float, tokens: int, chosen: int) -> None:
    task = MaskedLM(mask_share=share)
    batch = task.collate(blocks_of(task, ["a" * tokens], tokenizer), tokenizer)
    assert int((batch["labels"] != IGNORED).sum()) == chosen


def test_a_block_without_a_token_to_predict_is_left_out(tokenizer: Any) -> None:
    task = MaskedLM(max_length=6)
    rows = blocks_of(task, ["abcd 字 字 字 字 abcd"], tokenizer)
    assert [len(row["input_ids"]) for row in rows] == [6, 6]
    with pytest.raises(DataError, match="has no token that could be predicted"):
        task.encode({"text": ["字 字"]}, tokenizer, ())


def test_a_random_token_is_any_but_a_special_one() -> None:
    special = np.array([0, 2, 3, 7])
    dice = np.random.default_rng(0)
    found = replaced(np.full(20000, 1), 3, special, 9, dice)
    counts = np.bincount(found, minlength=9) / 20000
    each = 0.1 / 5  # of 1, 4, 5, 6, 8
    assert counts == pytest.approx([0, 0.1 + each, 0, 0.8, each, each, each, 0, each], abs=0.01)


def test_whole_words_are_hidden_together(tokenizer: Any) -> None:
    task = MaskedLM(max_length=40, whole_word=True, mask_share=0.3)
    rows = blocks_of(task, [text(8, seed) for seed in range(60)], tokenizer)
    batch = task.collate(rows, tokenizer)
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
        plain = [i for i, piece in enumerate(pieces) if piece not in tokenizer.all_special_tokens]
        words: list[list[int]] = []
        for i in plain:  # the pieces of this tokenizer say themselves whether they go on; a block may begin inside
            if words and pieces[i].startswith("##"):
                words[-1].append(i)
            else:
                words.append([i])
        hidden = [{labels[i] != IGNORED for i in word} for word in words]
        assert all(len(one) == 1 for one in hidden)
        count = sum(label != IGNORED for label in labels)
        assert 1 <= count <= max(round(0.3 * len(plain)), max(map(len, words)))
    assert "begins" not in blocks_of(MaskedLM(), TEXTS, tokenizer)[0]


def test_an_evaluation_asks_the_same_whatever_ran_before(corpus: Callable[..., Corpus]) -> None:
    one = corpus()
    first = [batch["input_ids"] for batch in one.evaluation("test")]
    list(one.training())
    torch.manual_seed(99)
    again = [batch["input_ids"] for batch in corpus(seed=5).evaluation("test")]
    assert all(map(torch.equal, first, again))


def test_a_block_is_masked_alike_in_any_company(tokenizer: Any) -> None:
    task = MaskedLM(max_length=16)
    rows = blocks_of(task, [text(9, seed) for seed in range(9)], tokenizer)
    whole = task.collate(rows, tokenizer)["input_ids"]
    parts = [task.collate([row], tokenizer)["input_ids"][0] for row in reversed(rows)]
    assert all(torch.equal(row[: len(part)], part) for row, part in zip(whole.flip(0), parts, strict=True))


def test_each_epoch_and_each_seed_hides_others(corpus: Callable[..., Corpus]) -> None:
    def hidden(seed: int, epoch: int) -> dict[tuple[int, ...], list[bool]]:
        batches = corpus(seed).training()
        batches.batch_sampler.set_epoch(epoch)
        return {
            tuple(row.tolist()): (labels != IGNORED).tolist()
            for batch in batches
            for row, labels in zip(original(batch), batch["labels"], strict=True)
        }

    drawn = [hidden(0, 0), hidden(0, 1), hidden(1, 0)]
    assert drawn[0].keys() == drawn[1].keys() == drawn[2].keys()
    assert drawn[0] == hidden(0, 0)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = [drawn[one][key] == drawn[other][key] for key in drawn[0]]
        assert sum(same) < 0.2 * len(same)


def test_masks_are_drawn_beside_all_generators(tokenizer: Any) -> None:
    """Those that dropout draws from are left alone."""
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    task = MaskedLM()
    task.draw(blocks_of(task, TEXTS, tokenizer), tokenizer, (0, 1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_its_own_masks(corpus: Callable[..., Corpus], workers: int) -> None:
    def of_second_epoch(batches: Batches, skipped: int) -> list[torch.Tensor]:
        batches.load_state_dict({"epoch": 1, "position": skipped})
        return [batch["input_ids"] for batch in batches]

    whole = of_second_epoch(corpus().training(), 0)
    rest = of_second_epoch(corpus(workers=workers).training(), 3)
    assert len(rest) == len(whole) - 3 > 0
    assert all(map(torch.equal, whole[3:], rest))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_what_is_hidden(setting: Callable[..., Any], smoothing: float) -> None:
    one = setting("bert", "masked_lm")
    batch = one.batch()
    with torch.no_grad():
        outputs = one.model(**one.task.inputs(batch))
        theirs = one.model(**one.task.inputs(batch), labels=batch["labels"]).loss
    total, count, classes = 0.0, 0, len(one.tokenizer)
    for row, labels in zip(outputs.logits.double(), batch["labels"].tolist(), strict=True):
        for place, label in enumerate(labels):
            if label != IGNORED:
                logs = row[place].log_softmax(-1)
                total -= float((1 - smoothing) * logs[label] + smoothing / classes * logs.sum())
                count += 1
    assert 2 <= count < (batch["labels"] == IGNORED).sum()
    assert len(one.task.predictions(outputs, batch)) == count
    loss = one.task.loss(outputs, batch, smoothing=smoothing)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    if not smoothing:
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_scores_are_those_of_plain_arithmetic() -> None:
    """Two batches: of three hidden tokens one is found, with chances 1/2, 1/4 and 1/8."""
    scores = MaskedLM().scores(())
    logs = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1.0, 1e-9, 1e-9]]]))
    scores.update(SimpleNamespace(logits=logs), {"labels": torch.tensor([[0, 1, IGNORED]])})
    last = torch.log(torch.tensor([[[0.75, 0.125, 0.125]]]))
    scores.update(SimpleNamespace(logits=last), {"labels": torch.tensor([[2]])})
    found = scores.compute()
    assert found["loss"] == pytest.approx((math.log(2) + math.log(4) + math.log(8)) / 3, rel=1e-6)
    assert found["perplexity"] == pytest.approx(4, rel=1e-6)
    assert found["accuracy"] == pytest.approx(1 / 3)


def test_the_answers_are_the_likeliest_tokens_of_each_mask(setting: Callable[..., Any]) -> None:
    one = setting("bert", "masked_lm")
    one.task = MaskedLM(fillings=2)
    with torch.no_grad():
        found = list(
            one.task.answers(one.model, one.tokenizer, (), [{"text": "a [MASK] b [MASK]"}, {"text": "[MASK]"}])
        )
        ids = torch.tensor([one.tokenizer("a [MASK] b [MASK]")["input_ids"]])
        chances = one.model(ids).logits[0].softmax(-1)
    assert [len(row["fillings"]) for row in found] == [2, 1]
    for place, filling in zip((2, 4), found[0]["fillings"], strict=True):
        order = chances[place].argsort(descending=True)[:2]
        assert [one.tokenizer.convert_tokens_to_ids(each["token"]) for each in filling] == order.tolist()
        assert [each["score"] for each in filling] == pytest.approx(chances[place][order].tolist(), abs=1e-4)


def test_a_mask_may_be_written_in_the_usual_way(tokenizer: Any, setting: Callable[..., Any]) -> None:
    one = setting("bert", "masked_lm")
    tokens = dict(one.tokenizer.special_tokens_map)
    other = type(one.tokenizer)(tokenizer_object=one.tokenizer.backend_tokenizer, **{**tokens, "mask_token": "<mask>"})
    other.add_special_tokens({"mask_token": "<mask>"})
    one.model.resize_token_embeddings(len(other))
    with torch.no_grad():
        ours, theirs = (list(one.task.answers(one.model, other, (), [{"text": t}])) for t in ("a [MASK]", "a <mask>"))
    assert ours[0]["fillings"] == theirs[0]["fillings"]
    assert len(ours[0]["fillings"]) == 1


def test_texts_that_cannot_be_filled(setting: Callable[..., Any]) -> None:
    one = setting("bert", "masked_lm", overrides={"max_position_embeddings": 16})
    with pytest.raises(
        DataError, match=r"^text 'a rose': has no mask; write \[MASK\] where tokens are to be filled in$"
    ):
        list(one.task.answers(one.model, one.tokenizer, (), [{"text": "a rose"}]))
    with torch.no_grad():
        list(one.task.answers(one.model, one.tokenizer, (), [{"text": "[MASK]" + "a" * 13}]))
        with pytest.raises(DataError, match=r"its 17 tokens are more than the 16 that the model reads"):
            list(one.task.answers(one.model, one.tokenizer, (), [{"text": "[MASK]" + "a" * 14}]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_model_that_reads_from_left_to_right_is_refused(family: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^task=masked_lm: .* {family} reads from left to right; use task=causal_lm"
    ):
        Tiny(name=family).empty(MaskedLM(), ())
    with pytest.raises(ConfigError, match=r"^task=masked_lm: .* bert reads from left to right"):
        Tiny(name="bert", overrides={"is_decoder": True}).empty(MaskedLM(), ())


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_model_with_a_decoder_beside_its_encoder_is_refused(family: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^task=masked_lm: needs an encoder, and {family} is an encoder with a decod"
    ):
        Tiny(name=family).empty(MaskedLM(), ())


def test_a_tokenizer_without_a_mask_is_refused(tokenizer: Any) -> None:
    blind = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", sep_token="[SEP]")
    with pytest.raises(ConfigError, match=r"^task=masked_lm: the tokenizer of .* has no mask token; needs a model"):
        MaskedLM().encode({"text": TEXTS}, blind, ())


@pytest.mark.parametrize("wrong", [{"mask_share": 0.0}, {"mask_share": 1.0}, {"fillings": 0}, {"max_length": 3}])
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"^task\.{name}={wrong[name]}: needs"):
        MaskedLM(**wrong)


@pytest.fixture
def headless(setting: Callable[..., Any], tmp_path: Path) -> Path:
    """A BERT without a head, as sentence encoders are stored."""
    one = setting()
    one.model.bert.save_pretrained(tmp_path / "headless")
    one.tokenizer.save_pretrained(tmp_path / "headless")
    return tmp_path / "headless"


def context_of(model: Any, setting: Callable[..., Any]) -> Context:
    one = setting("bert", "masked_lm")
    one.model = model
    context: Context = one.context()
    context.head_learns = model.head_is_new
    return context


def test_a_head_may_be_new_and_is_tied_to_the_embeddings(headless: Path, setting: Callable[..., Any]) -> None:
    model = Pretrained(name=str(headless)).load(MaskedLM(), (), 0)
    assert model.head_is_new
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    LoRA(rank=2).prepare(model, context_of(model, setting))
    learning = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("cls.predictions.")}
    assert not table.requires_grad
    whole = setting("bert", "masked_lm").model
    assert not hasattr(whole, "head_is_new")  # a tiny model is as it was made


def test_a_run_trains_a_new_head_whatever_its_tuning(headless: Path, tmp_path: Path) -> None:
    settings = ["model=pretrained", f"model.name={headless}", "tuning=ia3", "compression=[prune/magnitude]"]
    recipe = recipe_of("masked_lm", write_rows(tmp_path)["masked_lm"], *settings)
    corpus, work = begin(recipe)
    start = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    train(recipe, corpus, work, tmp_path)
    moved = {name for name, p in work.model.named_parameters() if not torch.equal(p, start[name])}
    assert {name for name in start if name.startswith("cls.")} == {name for name in moved if "ia3" not in name}
    finish(recipe, corpus, work, tmp_path)


def test_a_head_that_is_there_is_not_new(setting: Callable[..., Any], tmp_path: Path) -> None:
    one = setting("bert", "masked_lm")
    one.model.save_pretrained(tmp_path)
    one.tokenizer.save_pretrained(tmp_path)
    model = Pretrained(name=str(tmp_path)).load(one.task, (), 0)
    assert not model.head_is_new
    one.model = model
    context = one.context()
    LoRA(rank=2).prepare(model, context)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]


def test_embeddings_are_never_new(headless: Path) -> None:
    untied = {"tie_word_embeddings": False}
    with pytest.raises(
        ConfigError, match=r"has no weights that fit cls\.predictions\.decoder\.weight, which would stay"
    ):
        Pretrained(name=str(headless), overrides=untied).load(MaskedLM(), (), 0)
    with pytest.raises(ConfigError, match=r"has no weights that fit bert\.embeddings\.word_embeddings\.weight"):
        Pretrained(name=str(headless), overrides={"vocab_size": 200}).load(MaskedLM(), (), 0)


@pytest.mark.parametrize("tuning", [LoRA(rank=2, merge=False), Houlsby(size=4, merge=False)])
def test_a_new_head_does_not_stand_beside_the_base(headless: Path, setting: Callable[..., Any], tuning: Any) -> None:
    model = Pretrained(name=str(headless)).load(MaskedLM(), (), 0)
    context = context_of(model, setting)
    tuning.grow(model, context.anatomy)
    with pytest.raises(ConfigError, match=r"^tuning\.merge=false: the model came without a head for this task"):
        tuning.prepare(model, context)


def test_a_teacher_has_a_head(headless: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no trained head for the task masked_lm"):
        loaded(str(headless), MaskedLM(), "compression.logits.teacher")


def test_an_artifact_is_scored_on_the_same_masks(corpus: Callable[..., Corpus], setting: Any, tmp_path: Path) -> None:
    """`niwaki evaluate` on the rows of the test split says what the run said."""
    from niwaki.measure.evaluate import evaluate

    one, rows = setting("bert", "masked_lm"), corpus(seed=7)
    artifact.save(
        tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=rows.task, labels=(),
        base_config=one.model.config.to_dict(), edits=[],
    )  # fmt: skip
    found, _ = inference.scores(
        artifact.load(tmp_path / "model"), inference.WholeFile(train=str(tmp_path / "rows.txt"))
    )
    expected = evaluate(one.model, rows.evaluation("test"), rows.task, ()).compute()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
