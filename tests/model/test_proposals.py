"""Words that a masked language model proposes: which tokens are words, where the mask stands, which are likeliest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trained
from mask_models import KINDS, masked_lm, save
from transformers import AutoModel

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.model import proposals
from niwaki.model.proposals import Proposer, whole_words
from niwaki.model.tiny import Tiny
from niwaki.task.ner import WORD

TEXT = "the wall, in trees (autumn) x"


def spans_of(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in WORD.finditer(text) if proposals.is_word(match.group())]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_words_are_tokens_that_begin_one(kind: str) -> None:
    tokenizer = KINDS[kind]()
    words = whole_words(tokenizer)
    marks = {"WordPiece": "", "BPE": "Ġ", "Unigram": "▁"}
    for number, word in words.items():
        assert tokenizer.convert_ids_to_tokens(number) == f"{marks[kind]}{word}"
    assert {"pine", "winter", "scissors"} <= set(words.values())
    spelled = [token for token in tokenizer.get_vocab() if token.strip("Ġ▁#") and "MASK" not in token]
    pieces = [token for token in spelled if token.startswith("##") or (marks[kind] and token[0] != marks[kind])]
    assert len(pieces) > 20
    assert not {tokenizer.convert_tokens_to_ids(token) for token in pieces} & set(words)


def test_no_special_or_unused_token_and_none_without_a_letter() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "!", "-", "a", "pine", "##s", "u.s", "7", "é"]
    inner = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer = trained.fast(inner)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.add_tokens(["<added>", "added"])
    assert list(whole_words(tokenizer).values()) == ["a", "pine", "u.s", "7", "é"]


def known(tokenizer: Any, text: str) -> str:
    """The text as far as the tokenizer can write it."""
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_mask_stands_in_place_of_a_word_and_of_nothing_else(kind: str) -> None:
    """Also of a word of several pieces, with the space before it."""
    tokenizer = KINDS[kind]()
    proposer = Proposer(masked_lm(tokenizer), tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    several = 0
    for number, place, found in proposer._masked(TEXT, spans_of(TEXT)):
        start, end = spans_of(TEXT)[number]
        before = tokenizer(TEXT[:start].rstrip(), add_special_tokens=False)["input_ids"]
        assert found.count(tokenizer.mask_token_id) == 1
        assert found[: place + 1] == [*ids[:1], *before, tokenizer.mask_token_id]
        behind = found[place + 1 :]
        assert behind == ids[len(ids) - len(behind) :]
        assert tokenizer.decode(behind, skip_special_tokens=True).split() == known(tokenizer, TEXT[end:]).split()
        several += len(ids) > len(found)
    assert several


def test_words_that_a_model_cannot_read_have_none() -> None:
    tokenizer = Tiny().tokenizer()
    model = masked_lm(tokenizer)
    model.config.max_position_embeddings = 6
    text = "a b c d e f"
    found = Proposer(model, tokenizer).propose([(text, spans_of(text))], 3, 8)
    assert [len(words) for words in found[0]] == [3, 3, 3, 3, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_candidates_are_the_likeliest_words(kind: str) -> None:
    """Each against a forward pass of its own; never the word itself."""
    tokenizer = KINDS[kind]()
    model = masked_lm(tokenizer)
    proposer = Proposer(model, tokenizer)
    texts = [(text, spans_of(text)) for text in (TEXT, "Pine", "the old pine in winter")]
    found = proposer.propose(texts, 4, 3)
    assert found == proposer.propose(texts, 4, 100)
    words = whole_words(tokenizer)
    for (text, spans), candidates in zip(texts, found, strict=True):
        questions = list(proposer._masked(text, spans))
        assert [number for number, *_ in questions] == list(range(len(spans)))
        for number, place, ids in questions:
            own = text[slice(*spans[number])].casefold()
            with torch.inference_mode():
                scores = model(torch.tensor([ids])).logits[0, place]
            ranked = sorted((i for i, word in words.items() if word.casefold() != own), key=lambda i: -scores[i])
            assert candidates[number] == [words[i] for i in ranked[:4]]


def test_candidates_worked_by_hand() -> None:
    tokenizer = Tiny().tokenizer()
    order = ["##q", "b", "[MASK]", "!", "x", "7"]
    proposer = Proposer(masked_lm(tokenizer, likeliest=order), tokenizer)
    text = "a X pine"
    assert proposer.propose([(text, spans_of(text))], 2, 8) == [[["b", "x"], ["b", "7"], ["b", "x"]]]
    (every,) = proposer.propose([("q", [(0, 1)])], 1000, 8)
    assert len(every[0]) == 35  # letters and digits but for q


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    def call(name: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            proposals.load(str(name), "cpu")
        said = str(caught.value)
        assert said.startswith(f"--model {str(name)!r}: ")
        assert "\n" not in said
        return said.partition(": ")[2]

    return call


def test_what_is_no_masked_language_model(refused: Any, setting: Any, tmp_path: Path) -> None:
    spec = Tiny()
    tokenizer = spec.tokenizer()
    AutoModel.from_config(spec.config()).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    assert refused(tmp_path / "bare").startswith("has no head of a masked language model (cls.predictions.")
    trained.folder(tmp_path / "gpt", "gpt2", "causal_lm", KINDS["BPE"]())
    assert refused(tmp_path / "gpt") == "transformers has no masked gpt2 model"
    trained.folder(tmp_path / "maskless", "bert", "classification", trained.word_piece())
    assert refused(tmp_path / "maskless").startswith("its tokenizer has no mask token")
    assert refused("./none") == "there is no such folder"
    one = setting()
    artifact.save(
        tmp_path / "artifact", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
        base_config=one.model.config.to_dict(), edits=[],
    )  # fmt: skip
    assert refused(tmp_path / "artifact") == "is a BertForSequenceClassification, no masked language model"


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert"])
def test_every_family_that_has_them(tmp_path: Path, family: str) -> None:
    tokenizer = Tiny(name=family).tokenizer()
    place = save(tmp_path / family, tokenizer, family=family, likeliest=["w", "z"])
    assert proposals.load(place, "cpu").propose([("a z", [(0, 1), (2, 3)])], 1, 8) == [[["w"], ["w"]]]


def test_devices() -> None:
    assert proposals.chosen_device("auto") in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="--device tpu: needs auto, cpu or cuda"):
        proposals.chosen_device("tpu")
