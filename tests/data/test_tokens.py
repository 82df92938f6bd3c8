"""Tokenizers with fewer tokens: what is made of those that stay is read as before, anything else in smaller pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trained import KINDS, OTHERS, TEXTS, byte_pairs, fast, unigram, word_piece

from niwaki.data import tokens
from niwaki.errors import ConfigError


def used(tokenizer: Any, texts: list[str]) -> set[int]:
    return {token for text in texts for token in tokenizer(text)["input_ids"]}


def kept_of(tokenizer: Any, texts: list[str]) -> list[int]:
    wanted = used(tokenizer, texts) | tokens.always(tokenizer) | tokens.alphabet(tokenizer)
    return sorted(tokens.with_parts(tokenizer, wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_kept_tokens_is_read_as_before(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    whole = KINDS[kind]()
    kept = kept_of(whole, TEXTS[:2])
    smaller = tokens.cut(whole, kept)
    assert len(smaller) == len(kept) < len(whole) - 15
    smaller.save_pretrained(tmp_path)
    known = set(kept)
    read = 0
    words = [f"{a} {b}" for text in [*TEXTS, *OTHERS] for a in text.split() for b in TEXTS[0].split()]
    for tokenizer in (smaller, AutoTokenizer.from_pretrained(tmp_path)):
        for text in [*TEXTS, *OTHERS, *words]:
            before, after = whole(text)["input_ids"], [kept[token] for token in tokenizer(text)["input_ids"]]
            if set(before) <= known:
                read += 1
                assert after == before
            assert after.count(whole.unk_token_id) <= before.count(whole.unk_token_id), text
            assert set(after) <= known
    assert read > 100


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_added_tokens_have_their_new_numbers(kind: str) -> None:
    whole = KINDS[kind]()
    kept = kept_of(whole, TEXTS[:1])
    smaller = tokens.cut(whole, kept)
    assert {name: kept[smaller.convert_tokens_to_ids(name)] for name in smaller.get_vocab()} == {
        name: number for name, number in whole.get_vocab().items() if number in set(kept)
    }
    assert smaller("pine")["input_ids"][0] == smaller.cls_token_id
    assert smaller("pine")["input_ids"][-1] == smaller.sep_token_id
    assert [kept[i] for i in smaller.all_special_ids] == whole.all_special_ids
    if kind == "BPE":
        assert kept[smaller("a<added>b")["input_ids"][2]] == whole.convert_tokens_to_ids("<added>")


@pytest.mark.parametrize("way", ["bert", "roberta", "template", "sequence"])
def test_special_tokens_behind_the_others(way: str) -> None:
    """Their numbers change, in every kind of post-processor."""
    from tokenizers import Tokenizer, models, processors

    names = ["a", "b", "c", "ab", "[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="[UNK]"))
    ends = [("[SEP]", 7), ("[CLS]", 6)]
    template = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    backend.post_processor = {
        "bert": processors.BertProcessing(*ends), "roberta": processors.RobertaProcessing(*ends), "template": template,
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
    }[way]  # fmt: skip
    whole = fast(backend)
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert whole("abcb")["input_ids"] == [6, 3, 2, 1, 7]
    smaller = tokens.cut(whole, kept)
    assert smaller("abcb")["input_ids"] == [5, 2, 4, 1, 6]
    assert (smaller.cls_token_id, smaller.sep_token_id, smaller.unk_token_id, smaller.pad_token_id) == (5, 6, 4, 3)


def test_every_byte_can_be_written_still() -> None:
    whole = byte_pairs()
    smaller = tokens.cut(whole, kept_of(whole, TEXTS[:1]))
    for text in ("ünïcödé ☃ 庭木", "tabs\tand\nlines", *OTHERS):
        assert smaller.decode(smaller(text, add_special_tokens=False)["input_ids"]) == text


def test_the_way_to_a_merged_piece_is_kept() -> None:
    """Merges worked out by hand: ab, then abc on top of it, and a bc that abc is not made of."""
    from tokenizers import Tokenizer, models

    vocabulary = {
        piece: i
        for i, piece in enumerate(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "ab", "bc", "abc", "cd", "abcd"]
        )
    }
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("abc", "d"), ("ab", "cd")]
    whole = fast(Tokenizer(models.BPE(vocabulary, merges, unk_token="[UNK]")))
    assert tokens.parts("abcd", {pair: i for i, pair in enumerate(merges)}) == {"a", "b", "c", "d", "ab", "abc", "abcd"}
    assert {v for v in vocabulary if vocabulary[v] in tokens.with_parts(whole, {vocabulary["abcd"]})} == {
        "a", "b", "c", "d", "ab", "abc", "abcd",
    }  # fmt: skip
    kept = sorted(tokens.with_parts(whole, {*tokens.always(whole), vocabulary["abcd"]}))
    content = tokens.content_of(tokens.cut(whole, kept))["model"]
    assert [tuple(pair) for pair in content["merges"]] == [("a", "b"), ("ab", "c"), ("abc", "d")]


def test_a_piece_that_no_others_spell_is_kept() -> None:
    from tokenizers import Tokenizer, models

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##a", "##b", "aab", "abc", "##ab", "##ca", "b"]
    vocabulary = {name: i for i, name in enumerate(names)}
    whole = fast(Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")))
    needed = {names[i] for i in tokens.alphabet(whole)} - {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    assert needed == {"a", "##a", "##b", "b", "abc", "##ca"}  # nothing else writes a c


def test_the_score_of_what_is_unknown_stays() -> None:
    """The tokenizer counts it from the lowest score of its pieces."""
    whole = unigram()
    model = tokens.content_of(whole)["model"]
    lowest = min(score for _, score in model["vocab"])
    cut = tokens.content_of(tokens.cut(whole, kept_of(whole, TEXTS[:1])))["model"]
    assert min(score for _, score in cut["vocab"]) == lowest
    assert cut["vocab"][cut["unk_id"]][0] == "[UNK]"


def test_a_tokenizer_of_whole_words_is_refused() -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "pine"])}
    whole = fast(Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")))
    with pytest.raises(ConfigError, match=r"^compression\.vocabulary: needs a tokenizer of WordPiece, BPE, Unigram;"):
        tokens.alphabet(whole)


def test_parts_of_words_with_a_suffix_are_refused() -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {"[UNK]": 0, "a</w>": 1}
    whole = fast(Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]", end_of_word_suffix="</w>")))
    with pytest.raises(ConfigError, match="without a prefix or suffix"):
        tokens.alphabet(whole)


def test_whether_there_is_a_token_for_the_unknown() -> None:
    assert tokens.has_unknown(word_piece())
    assert tokens.has_unknown(unigram())
    assert not tokens.has_unknown(byte_pairs())
