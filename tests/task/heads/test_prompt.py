"""Patterns and words: logits of the model's own language head, what is cut, and which words can stand for labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from niwaki.errors import ConfigError
from niwaki.task.heads.prompt import Prompt
from niwaki.task.patterns import Pattern, word_tokens

HEAD = ["task.head=prompt", "task.verbalizer={red: r, green: g, blue: b}"]


def plain(model: Any, kind: str) -> Any:
    """The same weights in the model that transformers makes."""
    made = getattr(transformers, kind).from_config(model.config).eval()
    made.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("words.")})
    return made


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "modernbert"])
def test_logits_of_a_masked_model(begun: Callable[..., Any], name: str) -> None:
    made, corpus, model = begun(*HEAD, f"model=tiny-{name}", "task.pattern='It is {mask}: {text}'")
    batch = next(iter(corpus.evaluation("test")))
    assert not bool(batch["attention_mask"].all())
    with torch.no_grad():
        ours = model(**made.task.inputs(batch)).logits
        whole = plain(model, "AutoModelForMaskedLM")(**made.task.inputs(batch)).logits
    tokens = corpus.tokenizer.convert_tokens_to_ids(["b", "g", "r"])  # blue, green, red
    for row, ids in enumerate(batch["input_ids"].tolist()):
        assert torch.allclose(ours[row], whole[row, ids.index(corpus.tokenizer.mask_token_id), tokens], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_logits_of_a_causal_model(begun: Callable[..., Any], name: str) -> None:
    made, corpus, model = begun(*HEAD, f"model=tiny-{name}")
    batch = next(iter(corpus.evaluation("test")))
    text = corpus.tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()])
    assert text.endswith("this is about")
    reference = plain(model, "AutoModelForCausalLM")
    tokens = corpus.tokenizer.convert_tokens_to_ids(["b", "g", "r"])
    with torch.no_grad():
        ours = model(**made.task.inputs(batch)).logits
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            alone = reference(input_ids=ids[mask.bool()][None]).logits[0, -1, tokens]
            assert torch.allclose(ours[row], alone, atol=1e-5)


def test_only_the_text_is_cut(tokenizer: Any) -> None:
    pattern = Pattern("so {text} it is {mask}.", causal=False, max_length=16)
    long, short = pattern.encoded([{"text": "abcdefghijklmnop"}, {"text": "ab"}], tokenizer)
    expected = "[CLS] s ##o a ##b ##c ##d ##e ##f i ##t i ##s [MASK] . [SEP]"
    assert " ".join(tokenizer.convert_ids_to_tokens(long)) == expected
    assert tokenizer.convert_ids_to_tokens(short)[-3:] == ["[MASK]", ".", "[SEP]"]
    pair = Pattern("{text}? {mask}, {text_pair}", causal=False, max_length=12)
    (both,) = pair.encoded([{"text": "abc", "text_pair": "uvwxyzuvwxyz"}], tokenizer)
    expected = "[CLS] a ##b ##c ? [MASK] , u ##v ##w ##x [SEP]"
    assert " ".join(tokenizer.convert_ids_to_tokens(both)) == expected
    with pytest.raises(ConfigError, match=r"task\.max_length=5: task\.pattern=.* alone has 10 tokens"):
        Pattern("so {text} it is {mask}.", causal=False, max_length=5).encoded([{"text": "abc"}], tokenizer)


def test_a_text_cannot_ask_by_itself(tokenizer: Any) -> None:
    (ids,) = Pattern("{text} {mask}", causal=False, max_length=64).encoded([{"text": "a [MASK] b {mask}"}], tokenizer)
    assert ids.count(tokenizer.mask_token_id) == 1
    assert ids.index(tokenizer.mask_token_id) == len(ids) - 2


def test_words_for_labels(tokenizer: Any) -> None:
    assert word_tokens(["yes", "no"], {"yes": "y", "no": "n"}, tokenizer) == tokenizer.convert_tokens_to_ids(["y", "n"])
    with pytest.raises(ConfigError, match=r"'Sci Tech', for the label 'Sci/Tech', is not one token.*Sci/Tech=T"):
        word_tokens(["Sci/Tech"], {}, tokenizer)
    with pytest.raises(ConfigError, match=r"'a' stands for both 'x' and 'y'"):
        word_tokens(["x", "y"], {"x": "a", "y": "a"}, tokenizer)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.pattern='{text} is'"], r"task\.pattern='\{text\} is': needs \{text\} once and \{mask\} once"),
        (["task.pattern='{text} {text_pair} {mask}'"], r"the rows have no text_pair"),
        (["model=tiny-llama", "task.pattern='{mask} is {text}'"], r"reads from left to right, so nothing of"),
        (["model=tiny-bart"], r"needs a model that fills in a word or goes on with a text"),
        (["task.verbalizer={rde: r}"], r"task\.verbalizer\.rde: the data has no such label; did you mean 'red'"),
        (["compression=[prune/vocabulary]"], r"prune/vocabulary and task\.head=prompt: the words for the labels"),
        (["export=[hf]"], r"export=hf: this head is niwaki's own"),
    ],
)
def test_refusals(begun: Callable[..., Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begun(*HEAD, *overrides)


def test_names_of_several_tokens_are_refused_before_weights_are_loaded(recipe: Callable[..., Any]) -> None:
    from niwaki.pipeline import read

    with pytest.raises(ConfigError, match=r"'blue', for the label 'blue', is not one token.*task\.verbalizer\.blue=b"):
        read(recipe("task.head=prompt"))


def test_pairs_need_a_place() -> None:
    head = Prompt(max_length=16)
    with pytest.raises(ConfigError, match=r"the rows have a text_pair; give it a place"):
        head.encode({"text": ["a"], "text_pair": ["b"]}, type("T", (), {"init_kwargs": {}, "mask_token_id": 4}), ["x"])


def test_a_head_that_was_replaced_is_read_at_the_same_place(begun: Callable[..., Any]) -> None:
    """Where an edit puts another layer in place of the output, all positions go through it."""
    made, corpus, model = begun(*HEAD, "model=tiny-llama")
    batch = made.task.inputs(next(iter(corpus.evaluation("test"))))
    with torch.no_grad():
        before = model(**batch).logits
        weight = model.lm_head.weight
        model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        model.lm_head.weight = weight
        assert torch.allclose(model(**batch).logits, before, atol=1e-6)
    assert model.words.place is None
