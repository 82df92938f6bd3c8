"""What is set reaches generate and nothing else does; draws have the distribution they say, and are a row's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from written import batch_of, features, tiny, without_padding

from niwaki import compose
from niwaki.errors import ConfigError
from niwaki.task import search
from niwaki.task.translation import Translation

ROWS = {"source": ["one", "twenty two", "three hundred"], "target": ["1", "22", "300"]}


def task(**settings: Any) -> Translation:
    return Translation(**{"max_length": 32, "max_target_length": 12, **settings})


def test_only_what_is_set_reaches_generate() -> None:
    plain = {"num_beams": 1, "do_sample": False, "max_new_tokens": 12}
    assert search.settings_of(task(), 1) == plain
    several = task(num_beams=4, length_penalty=0.6, min_target_length=3, no_repeat_ngram_size=2, repetition_penalty=1.2)
    assert search.settings_of(several, 4) == {
        **plain, "num_beams": 4, "length_penalty": 0.6, "min_new_tokens": 3, "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.2,
    }  # fmt: skip
    assert "length_penalty" not in search.settings_of(several, 1)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_settings_have_their_effect(family: str) -> None:
    long = task(min_target_length=8, no_repeat_ngram_size=1)
    model, tokenizer = tiny(family, long, scale=3.0)
    written = without_padding(long.write(model, batch_of(long, tokenizer, ROWS), num_beams=1))
    assert all(len(row) >= 8 and len(set(row)) == len(row) for row in written)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_the_model_says_what_the_task_does_not(family: str) -> None:
    model, tokenizer = tiny(family, task(), scale=3.0)
    model.generation_config.no_repeat_ngram_size = 1
    written = without_padding(task().write(model, batch_of(task(), tokenizer, ROWS), num_beams=1))
    assert all(len(set(row)) == len(row) for row in written)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_a_draw_is_the_same_in_any_batch_and_another_by_seed(family: str) -> None:
    one = task(do_sample=True, temperature=2.0)
    model, tokenizer = tiny(family, one)
    rows = features(one, tokenizer, ROWS)
    together = without_padding(one.answered(model, one.collate(rows, tokenizer)))
    torch.manual_seed(99)  # which nothing hangs on
    for row, mine in zip(rows, together, strict=True):
        assert without_padding(one.answered(model, one.collate([row], tokenizer))) == [mine]
    again = without_padding(one.answered(model, one.collate(rows, tokenizer), 1))
    other = task(do_sample=True, temperature=2.0, seed=1)
    assert together != again != without_padding(other.answered(model, other.collate(rows, tokenizer)))


def test_draws_have_the_distribution_of_softmax() -> None:
    """20,000 draws of one token: by temperature, and of the likeliest alone."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sources = [torch.tensor([number]) for number in range(20_000)]
    for settings, expected in (
        ({"temperature": 0.5}, torch.softmax(logits / 0.5, -1)),
        ({"top_k": 2}, torch.cat([torch.softmax(logits[:2], -1), torch.zeros(2)])),
        ({"top_p": 0.6}, torch.tensor([1.0, 0.0, 0.0, 0.0])),  # the first alone holds 0.64
    ):
        change = search.draw(task(do_sample=True, **settings), sources)(range(len(sources)), 0)
        drawn = change(torch.zeros(len(sources), 0), logits.expand(len(sources), -1)).argmax(-1)
        shares = torch.bincount(drawn, minlength=4) / len(sources)
        torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


def test_the_model_says_how_is_drawn_what_the_task_does_not() -> None:
    """With the likeliest alone the draw is the search; a task that sets it is heard instead."""
    one, other = task(do_sample=True), task(do_sample=True, top_k=50, temperature=2.0)
    model, tokenizer = tiny("llama", one)
    batch = batch_of(one, tokenizer, ROWS)
    free = without_padding(one.answered(model, batch))
    model.generation_config.top_k = 1
    likeliest = without_padding(one.write(model, batch, num_beams=1))
    assert without_padding(one.answered(model, batch)) == likeliest != free
    assert without_padding(other.answered(model, batch)) != likeliest
    model.generation_config.top_k, model.generation_config.temperature = 0, 0.0
    with pytest.raises(ConfigError, match=r"generation_config has temperature=0.0: nothing is drawn so; set task.temp"):
        one.answered(model, batch)


def test_the_least_number_draws_the_first_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for number, drawn in ((0.0, 1), (0.49, 1), (0.51, 3), (1.0 - 2**-53, 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: torch.tensor([number], dtype=torch.float64))
        change = search.draw(task(do_sample=True), [torch.tensor([1])])([0], 0)
        assert int(change(torch.zeros(1, 0), logits).argmax()) == drawn


def test_what_may_not_come_is_never_drawn_and_steps_differ() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2000, -1)
    sources = [torch.tensor([number]) for number in range(2000)]
    change = search.draw(task(do_sample=True), sources)(range(2000), 0)
    first, second = (change(torch.zeros(2000, 0), logits) for _ in range(2))
    assert set(first.argmax(-1).tolist()) == {1, 3}
    assert ((first > -torch.inf).sum(-1) == 1).all()
    assert 800 < int((first.argmax(-1) == second.argmax(-1)).sum()) < 1200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.5}, "task.temperature=0.5: is read where texts are drawn; needs task.do_sample=true"),
        ({"do_sample": True, "num_beams": 2}, "task.num_beams=2: texts are searched or drawn"),
        ({"do_sample": True, "top_p": 1.5}, "task.top_p=1.5: needs null or a number above 0, up to 1"),
        ({"do_sample": True, "temperature": 0.0}, "task.temperature=0.0: needs null or a number above 0"),
        ({"length_penalty": 2.0}, "task.length_penalty=2.0: compares beams; needs task.num_beams above 1"),
        ({"min_target_length": 12}, "task.min_target_length=12: needs null or a whole number from 1, below"),
        ({"no_repeat_ngram_size": 0}, "task.no_repeat_ngram_size=0: needs null or a whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(**settings)


def test_draws_go_by_the_seed_of_the_run() -> None:
    assert compose.build(compose.compose(["task=translation", "model=tiny-bart", "seed=7"]).config).task.seed == 7
