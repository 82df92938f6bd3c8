"""NER: one label a word, no word lost to truncation, scores and table by hand, entities by offset."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

from niwaki.errors import ConfigError
from niwaki.task.ner import NER, WORD, entities, entities_of, first_pieces, lacks_space, retagged, told_once
from niwaki.task.task import IGNORED

TAGS = ("B-LOC", "B-PER", "I-PER", "O")


def test_the_label_stands_at_the_first_piece(setting: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    (row,) = one.features({"tokens": [["ada", "x", "lo"]], "tags": [["B-PER", "O", "I-PER"]]})
    assert one.tokenizer.convert_ids_to_tokens(row["input_ids"]) == [
        "[CLS]", "a", "##d", "##a", "x", "l", "##o", "[SEP]",
    ]  # fmt: skip
    assert row["labels"] == [IGNORED, 0, IGNORED, IGNORED, 2, 1, IGNORED, IGNORED]
    assert (row["cut"], row["length"]) == ([], 8)


def test_first_pieces() -> None:
    assert first_pieces([None, 0, 0, 1, 3, 3, None]) == [None, 0, None, 1, 3, None, None]


@pytest.mark.parametrize("overlap", [None, 0.0, 0.25, 0.5])
@pytest.mark.parametrize("max_length", range(4, 14))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_word_is_counted_once(
    setting: Callable[..., Any], family: str, max_length: int, overlap: float | None
) -> None:
    one = setting(family, "ner")
    one.task = NER(max_length=max_length, overlap=overlap)
    one.rows = {"tokens": [["ab", "c", "def", "g"], ["h"]], "tags": [["B-PER", "I-PER", "O", "B-PER"], ["O"]]}
    told: list[dict[int, str]] = [{}, {}]
    for row in one.features():
        pairs = [*zip(row["words"], row["labels"], strict=True), *zip(row["cut"], row["cut_labels"], strict=True)]
        for word, label in pairs:
            if label != IGNORED:
                assert word not in told[row["sentence"]]
                told[row["sentence"]][word] = one.labels[label]
        assert len(row["input_ids"]) <= max_length
        assert overlap is None or not row["cut"]
    assert [[words[i] for i in sorted(words)] for words in told] == one.rows["tags"]
    scores = one.task.scores(one.labels)
    batch = one.batch()
    with torch.no_grad():
        scores.update(one.model(**one.task.inputs(batch)), batch)
    assert scores.report()["averages"]["micro"]["support"] == 5


def test_a_word_is_tagged_where_it_has_most_around_it() -> None:
    """Three windows of one sentence: word 3 has nothing behind it in the first and a token before it in the second;
    the other sentence has one window, whose ends are those of the sentence."""
    firsts = [[None, 0, 1, 2, 3, None], [None, 2, 3, 4, 5, None], [None, 4, 5, 6, None], [None, 0, None]]
    assert told_once(firsts, [0, 0, 0, 1]) == [
        [None, 0, 1, 2, None, None], [None, None, 3, 4, None, None], [None, None, 5, 6, None], [None, 0, None],
    ]  # fmt: skip


def test_windows_are_put_together_in_order(setting: Callable[..., Any]) -> None:
    """A long sentence, its windows in any order: what the words are tagged as is that of a model that tags by word."""
    one = setting("bert", "ner")
    one.task = NER(max_length=8)
    words = list("abcdefghijklmnop")
    tags = [("B-PER", "I-PER", "O", "B-LOC")[i % 4] for i in range(16)]
    labels = ("B-LOC", "B-PER", "I-PER", "O")
    one.labels = labels
    features = one.features({"tokens": [words], "tags": [tags]})
    assert len(features) > 2
    scores = one.task.scores(labels)
    batch = one.task.collate(features[::-1], one.tokenizer)
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 4).float()
    scores.update(SimpleNamespace(logits=logits), batch)
    assert scores.compute()["f1"] == 1.0
    assert scores._true == scores._predicted == [tags]


@pytest.mark.parametrize(
    "tags",
    [
        ["I-PER", "I-PER", "O", "B-PER", "I-LOC", "I-LOC"],  # IOB1: B- only where two of a kind meet
        ["B-PER", "I-PER", "O", "B-PER", "B-LOC", "I-LOC"],
        ["B-PER", "E-PER", "O", "S-PER", "B-LOC", "E-LOC"],
    ],
)
def test_entities_are_read_off_any_scheme(tags: list[str]) -> None:
    assert entities_of(tags) == [("PER", 0, 1), ("PER", 3, 3), ("LOC", 4, 5)]
    assert retagged(tags, "iob2") == ["B-PER", "I-PER", "O", "B-PER", "B-LOC", "I-LOC"]
    assert retagged(tags, "bioes") == ["B-PER", "E-PER", "O", "S-PER", "B-LOC", "E-LOC"]
    assert retagged(tags, None) is tags
    found = {"train": Dataset.from_dict({"tags": [tags]})}
    assert NER(scheme="iob2").labels(found) == ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
    assert NER(scheme="bioes").labels(found)[:4] == ("B-LOC", "B-PER", "E-LOC", "E-PER")
    assert NER().labels(found) == tuple(sorted(set(tags)))


def test_tags_of_any_scheme_are_read_as_iob2() -> None:
    check = NER.needs.check("tags")
    assert check(["U-PER", "U-PER", "O", "B-LOC", "L-LOC"]) == ["B-PER", "B-PER", "O", "B-LOC", "I-LOC"]  # BILOU
    assert check(["NN", "VB"]) == ["NN", "VB"]
    with pytest.raises(ValueError, match="has 'X-PER' as tag 2, which begins with X-, must be O, or one of B-, I-"):
        check(["O", "X-PER"])
    assert NER(scheme="bioes").read_as("tags", ["B-PER", "O"]) == ["S-PER", "O"]
    assert NER(scheme="bioes").read_as("label", "B-PER") == "B-PER"


@pytest.mark.parametrize("overlap", [-0.1, 0.6])
def test_an_overlap_is_at_most_half(overlap: float) -> None:
    with pytest.raises(ConfigError, match=r"^task\.overlap="):
        NER(overlap=overlap)


def test_a_word_without_any_piece_is_counted_too(setting: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    (row,) = one.features({"tokens": [["a", "\u200b", "b"]], "tags": [["B-PER", "I-PER", "O"]]})
    assert [label for label in row["labels"] if label != IGNORED] == [0, 2]
    assert (row["cut"], row["cut_labels"]) == ([1], [1])


def update(scores: Any, labels: list[list[int]], guesses: list[list[int]], cut: list[list[int]] | None = None) -> None:
    """Feed label and guess numbers, padded with IGNORED, with logits of 1 for the guess, else 0."""
    logits = torch.nn.functional.one_hot(torch.tensor(guesses), len(TAGS)).float()
    width = max(len(row) for row in cut or [[]])
    lost = torch.tensor([row + [IGNORED] * (width - len(row)) for row in cut or [[]] * len(labels)])
    tags = torch.tensor(labels)
    words = torch.arange(tags.shape[1]).expand_as(tags).where(tags != IGNORED, IGNORED)
    behind = torch.arange(width) + tags.shape[1]
    batch = {
        "labels": tags, "words": words, "sentence": torch.arange(len(tags)),
        "cut": behind.expand(len(tags), -1).where(lost != IGNORED, IGNORED) if width else lost.view(len(tags), 0),
        "cut_labels": lost.view(len(tags), width).long(),
    }  # fmt: skip
    scores.update(SimpleNamespace(logits=logits), batch)


def test_entity_scores_by_hand() -> None:
    # true: PER(0-1) LOC(3) | PER(0); found: PER(0-1) PER(3) | PER(0): 2 of 3 both ways
    scores = NER().scores(TAGS)
    update(
        scores,
        [[1, 2, 3, 0, IGNORED], [1, 3, IGNORED, IGNORED, IGNORED]],
        [[1, 2, 3, 1, 0], [1, 3, 0, 0, 0]],
    )
    found = scores.compute()
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(5 / 6)
    log = torch.log_softmax(torch.tensor([1.0, 0.0, 0.0, 0.0]), 0)
    assert found["loss"] == pytest.approx(-(5 * log[0] + log[1]).item() / 6, rel=1e-5)


def test_half_an_entity_is_none() -> None:
    scores = NER().scores(TAGS)
    update(scores, [[1, 2, 3]], [[1, 3, 3]])
    assert scores.compute()["f1"] == 0.0
    assert scores.compute()["accuracy"] == pytest.approx(2 / 3)


def test_cut_words_count_as_missed() -> None:
    # true: PER(0), cut: LOC, O; found: PER(0), O, O: precision 1, recall 1/2
    scores = NER().scores(TAGS)
    update(scores, [[1, IGNORED]], [[1, 0]], [[0, 3]])
    found = scores.compute()
    assert (found["precision"], found["recall"]) == (1.0, 0.5)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(math.log(math.e + 3) - 1, rel=1e-5)  # of the one word that was seen
    assert scores.report()["per_class"]["B-LOC"] == {
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "support": 1.0,
    }


def test_the_table_by_hand() -> None:
    # true:  B-LOC B-PER B-PER O O O O O ; found: B-LOC B-PER O O O O B-PER B-LOC
    scores = NER().scores(TAGS)
    update(scores, [[0, 1, 1, 3, 3, 3, 3, 3]], [[0, 1, 3, 3, 3, 3, 1, 0]])
    report = scores.report()
    rows = {
        "B-LOC": (1 / 2, 1.0, 2 / 3, 1),
        "B-PER": (1 / 2, 1 / 2, 1 / 2, 2),
        "I-PER": (0.0, 0.0, 0.0, 0),
        "O": (3 / 4, 3 / 5, 2 / 3, 5),
    }
    names = ("precision", "recall", "f1", "support")
    assert list(report["per_class"]) == list(TAGS)
    for tag, row in rows.items():
        assert report["per_class"][tag] == pytest.approx(dict(zip(names, row, strict=True)))
    macro = [sum(row[i] for row in rows.values()) / 4 for i in range(3)]
    weighted = [sum(row[i] * row[3] for row in rows.values()) / 8 for i in range(3)]
    averages = report["averages"]
    assert averages["macro"] == pytest.approx(dict(zip(names, [*macro, 8], strict=True)))
    assert averages["weighted"] == pytest.approx(dict(zip(names, [*weighted, 8], strict=True)))
    assert averages["micro"] == pytest.approx(dict(zip(names, [5 / 8, 5 / 8, 5 / 8, 8], strict=True)))


def test_entities_and_their_offsets() -> None:
    text = "Ada met Alan  Turing."
    spans = [match.span() for match in WORD.finditer(text)]
    assert [text[a:b] for a, b in spans] == ["Ada", "met", "Alan", "Turing", "."]
    found = entities(
        text, list(zip(["B-PER", "O", "B-PER", "I-PER", "O"], [0.9, 1.0, 0.8, 0.6, 1.0], spans, strict=True))
    )
    assert found == [
        {"entity": "PER", "text": "Ada", "start": 0, "end": 3, "score": 0.9},
        {"entity": "PER", "text": "Alan  Turing", "start": 8, "end": 20, "score": 0.7},
    ]
    assert all(text[e["start"] : e["end"]] == e["text"] for e in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("U.S. and O'Neil-Smith's 3.5%", ["U.S", ".", "and", "O'Neil-Smith's", "3.5", "%"]),
        ("(café)", ["(", "café", ")"]),
        ("", []),
        ("  ", []),
    ],
)
def test_words_of_raw_text(text: str, words: list[str]) -> None:
    assert [match.group() for match in WORD.finditer(text)] == words


def test_each_chinese_character_is_a_word() -> None:
    assert WORD.findall("叶老桂，在ABC-1银行。") == ["叶", "老", "桂", "，", "在", "ABC-1", "银", "行", "。"]


def test_answers_are_those_of_the_logits(setting: Callable[..., Any]) -> None:
    one = setting("bert", "ner")
    one.model.classifier.bias.data = torch.tensor([9.0, 0.0, 0.0])  # every word begins a person
    rows = [{"text": "Ada met"}, {"text": ""}, {"text": "x"}]
    with torch.no_grad():
        found = list(one.task.answers(one.model, one.tokenizer, one.labels, rows))
    assert [[e["text"] for e in row["entities"]] for row in found] == [["Ada", "met"], [], ["x"]]
    assert all(0.9 < e["score"] <= 1 and e["entity"] == "PER" for row in found for e in row["entities"])


def test_a_batch_leaves_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[torch.Size] = []
    tolist = torch.Tensor.tolist
    rows = 20
    scores = NER().scores(TAGS)
    logits = torch.nn.functional.one_hot(torch.ones(rows, 3, dtype=torch.long), len(TAGS)).float()
    lost = torch.full((rows, 1), IGNORED)
    batch = {
        "labels": torch.ones(rows, 3, dtype=torch.long), "words": torch.arange(3).expand(rows, -1), "cut": lost,
        "cut_labels": lost, "sentence": torch.arange(rows),
    }  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor.shape) or tolist(tensor))
    scores.update(SimpleNamespace(logits=logits), batch)
    assert transfers == [(3, rows, 3), (2, rows, 1), (rows,)]
    assert scores.compute()["f1"] == 1.0


MERGES = [("a", "d"), ("Ġ", "ad"), ("Ġad", "a"), ("m", "e"), ("Ġ", "me"), ("Ġme", "t"), ("me", "t"), ("ad", "a")]


def byte_level(folder: Path, **settings: Any) -> Any:
    """A tokenizer as RoBERTa has it, of few merges: `ada` and ` ada` are pieces of their own."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), *map("".join, MERGES)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    transformers.RobertaTokenizerFast(vocab=vocabulary, merges=MERGES).save_pretrained(folder)
    transformers.AutoConfig.for_model("roberta", vocab_size=len(pieces)).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, **settings)


WORDS = {"tokens": [["ada", "met", "ada"], ["met"]], "tags": [["B-PER", "O", "B-PER"], ["O"]]}


def test_words_of_a_byte_level_tokenizer_have_their_space(tmp_path: Path) -> None:
    """The pieces that the words have in a text, as with add_prefix_space=True."""
    plain, prefixed = (byte_level(tmp_path / str(space), add_prefix_space=space) for space in (False, True))
    ours = NER().encode(WORDS, plain, TAGS)
    assert plain.convert_ids_to_tokens(ours["input_ids"][0]) == ["<s>", "Ġada", "Ġmet", "Ġada", "</s>"]
    assert ours["labels"][0] == [IGNORED, 1, 3, 1, IGNORED]
    assert ours["input_ids"] == prefixed(WORDS["tokens"], is_split_into_words=True)["input_ids"]
    assert ours == NER().encode(WORDS, prefixed, TAGS)


def test_a_split_before_the_bytes_gets_no_space_within_a_word(tmp_path: Path) -> None:
    """As in Llama 3 and Qwen2: a regular expression splits, and bytes follow. A space goes before words alone."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokenizer = byte_level(tmp_path)
    split = Split(Regex(r" ?\w+|\S"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    (ids,) = NER().encode({"tokens": [["ada", "met-ada"]], "tags": [["O", "O"]]}, tokenizer, TAGS)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "Ġada", "Ġmet", "-", "ada", "</s>"]


def test_an_artifact_with_a_byte_level_tokenizer_answers_as_it_was_trained(tmp_path: Path) -> None:
    from niwaki import artifact

    tokenizer = byte_level(tmp_path / "base")
    config = transformers.AutoConfig.for_model(
        "roberta", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, num_labels=len(TAGS), type_vocab_size=1,
    )  # fmt: skip
    model = transformers.AutoModelForTokenClassification.from_config(config).eval()
    artifact.save(
        tmp_path / "model", model=model, tokenizer=tokenizer, task=NER(max_length=32), labels=TAGS,
        base_config=config.to_dict(), edits=[],
    )  # fmt: skip
    saved = artifact.load(tmp_path / "model")
    seen: list[torch.Tensor] = []
    saved.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    with torch.no_grad():  # a bias alone decides: every word is a person
        saved.model.classifier.weight.zero_()
        saved.model.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
        (answer,) = saved.task.answers(saved.model, saved.tokenizer, saved.labels, [{"text": "ada met  ada"}])
    assert seen[0].tolist() == NER().encode(WORDS, tokenizer, TAGS)["input_ids"][:1]
    found = [(e["text"], e["start"], e["end"]) for e in answer["entities"]]
    assert found == [("ada", 0, 3), ("met", 4, 7), ("ada", 9, 12)]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_other_tokenizers_get_their_words_as_they_are(setting: Callable[..., Any], family: str) -> None:
    assert not lacks_space(setting(family).tokenizer)
