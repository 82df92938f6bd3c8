"""The tokens of a tokenizer: which of them spell others, and the same tokenizer without some of them."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from niwaki.errors import ConfigError

Content = dict[str, Any]  # of tokenizer.json


def content_of(tokenizer: Any) -> Content:
    """What tokenizer.json holds.

    Raises:
        ConfigError: the tokenizer is not of the kind that has one, or of a kind that cannot do with fewer tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Content = {} if backend is None else json.loads(backend.to_str())
    model = content.get("model", {})
    kind = model.get("type", type(tokenizer).__name__)
    if kind not in SPELLING:
        raise ConfigError(
            f"compression.vocabulary: needs a tokenizer of {', '.join(SPELLING)}; {kind} has no smaller pieces for a "
            "word whose token is gone"
        )
    if kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        raise ConfigError("compression.vocabulary: needs a BPE tokenizer without a prefix or suffix for parts of words")
    return content


def vocabulary_of(model: Content) -> dict[str, int]:
    """Number by piece, of the model in a tokenizer.json."""
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def always(tokenizer: Any) -> set[int]:
    """The numbers of special and of added tokens, which no text has to hold to be of use; and the token for what is
    unknown."""
    model = content_of(tokenizer)["model"]
    unknown = model.get("unk_id") if model["type"] == "Unigram" else vocabulary_of(model).get(model.get("unk_token"))
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *([] if unknown is None else [unknown])}


def has_unknown(tokenizer: Any) -> bool:
    """Whether what cannot be spelled becomes a token for the unknown, rather than nothing."""
    model = content_of(tokenizer)["model"]
    return (model.get("unk_id") if model["type"] == "Unigram" else model.get("unk_token")) is not None


def alphabet(tokenizer: Any) -> set[int]:
    """The numbers of the tokens that spell all others: characters or bytes, and each piece that these do not spell."""
    model = content_of(tokenizer)["model"]
    vocabulary = vocabulary_of(model)
    spelled = SPELLING[model["type"]](model, vocabulary)
    found = {number for piece, number in vocabulary.items() if not spelled(piece)}
    if model["type"] == "Unigram" and model["vocab"]:  # by which the score of an unknown character is counted
        found.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
    return found


def spelled_word_piece(model: Content, vocabulary: dict[str, int]) -> Callable[[str], bool]:
    """Whether a piece of several characters can be written with pieces of one."""
    prefix = model["continuing_subword_prefix"]

    def spelled(piece: str) -> bool:
        inside = piece.startswith(prefix) and piece != prefix
        body = piece.removeprefix(prefix) if inside else piece
        singles = [prefix + c if inside or i else c for i, c in enumerate(body)]
        return len(body) > 1 and all(single in vocabulary for single in singles)

    return spelled


def spelled_characters(model: Content, vocabulary: dict[str, int]) -> Callable[[str], bool]:
    """Whether a piece of several characters can be written with pieces of one; those of bytes stand for characters."""
    in_bytes = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    return lambda piece: len(piece) > 1 and piece not in in_bytes and all(c in vocabulary for c in piece)


SPELLING = {"WordPiece": spelled_word_piece, "BPE": spelled_characters, "Unigram": spelled_characters}


def with_parts(tokenizer: Any, kept: Iterable[int]) -> set[int]:
    """`kept` and, where pieces are merged of others (BPE), all those on the way to them."""
    model, found = content_of(tokenizer)["model"], set(kept)
    if model["type"] != "BPE":
        return found
    vocabulary = vocabulary_of(model)
    ranks = {pair: rank for rank, pair in enumerate(map(as_pair, model["merges"]))}
    whole = set(tokenizer.added_tokens_decoder)
    for piece, number in vocabulary.items():
        if number in found - whole:
            found |= {vocabulary[part] for part in parts(piece, ranks) if part in vocabulary}
    return found


def as_pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as it stands in tokenizer.json, either way."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def parts(piece: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Every piece that comes up while byte-pair encoding makes `piece` of its characters: at each step it merges the
    pair that was learned first, the leftmost among equals."""
    pieces = list(piece)
    found = set(pieces)
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]
        if not pairs:
            return found
        place = min(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        found.add(pieces[place])


def cut(tokenizer: Any, kept: Sequence[int]) -> Any:
    """The tokenizer with these tokens alone, which are numbered anew in their order. A text that was made of them
    before is made of them still.

    Raises:
        ConfigError: the files of the tokenizer hold more than can be cut.
    """
    from transformers import AutoTokenizer

    numbers = {old: new for new, old in enumerate(kept)}
    expected = {token: numbers[old] for token, old in tokenizer.get_vocab().items() if old in numbers}
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        file, settings = Path(place) / "tokenizer.json", Path(place) / "tokenizer_config.json"
        file.write_text(json.dumps(cut_content(content_of(tokenizer), numbers), ensure_ascii=False), encoding="utf-8")
        config = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            added = config["added_tokens_decoder"].items()
            config["added_tokens_decoder"] = {str(numbers[int(old)]): token for old, token in added}
            settings.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        smaller = AutoTokenizer.from_pretrained(place)
    if smaller.get_vocab() != expected:
        raise ConfigError("compression.vocabulary: the tokens of this tokenizer cannot be numbered anew")
    return smaller


def cut_content(content: Content, numbers: dict[int, int]) -> Content:
    """tokenizer.json with the tokens in `numbers` (old number -> new one) alone. No merge is left that needs, or makes,
    a piece that is gone."""
    model = dict(content["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in numbers]
        model["unk_id"] = numbers.get(model["unk_id"])
    else:
        model["vocab"] = {piece: numbers[old] for piece, old in model["vocab"].items() if old in numbers}
    if model["type"] == "BPE":
        pieces, merges = model["vocab"], map(as_pair, model["merges"])
        model["merges"] = [[a, b] for a, b in merges if a in pieces and b in pieces and a + b in pieces]
    added = [{**token, "id": numbers[token["id"]]} for token in content["added_tokens"]]
    padding = content["padding"] and {**content["padding"], "pad_id": numbers[content["padding"]["pad_id"]]}
    processor = content["post_processor"] and cut_processor(content["post_processor"], numbers)
    return {**content, "model": model, "added_tokens": added, "padding": padding, "post_processor": processor}


def cut_processor(processor: Content, numbers: dict[int, int]) -> Content:
    """A post-processor of tokenizer.json with the new numbers of the special tokens that it adds."""
    changed = dict(processor)
    if "processors" in processor:  # a sequence
        changed["processors"] = [cut_processor(one, numbers) for one in processor["processors"]]
    for name in ("sep", "cls"):  # BERT's and RoBERTa's own
        if name in processor:
            changed[name] = [processor[name][0], numbers[processor[name][1]]]
    if "special_tokens" in processor:  # a template
        changed["special_tokens"] = {
            name: {**token, "ids": [numbers[old] for old in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    return changed
