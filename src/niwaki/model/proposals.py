"""Words that a masked language model would put in place of others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki import artifact
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.model.load import Pretrained, renamed
from niwaki.task.ner import WORD
from niwaki.task.task import batched, pad

Span = tuple[int, int]
LONGEST = 512  # tokens of a text that are read, where the model sets no lower bound


class Proposer:
    """A masked language model, asked with one mask in place of a word, however many pieces the word has.

    Only tokens that are a word by themselves are proposed, never the word that stood there, in whatever case.
    """

    def __init__(self, model: Any, tokenizer: Any, device: str = "cpu") -> None:
        self._model = model.to(device).eval()
        self._tokenizer = tokenizer
        self._device = device
        self._longest = min(Anatomy.of(model).positions or LONGEST, LONGEST)
        words = whole_words(tokenizer)
        if not words:
            raise ConfigError("--model: no token of its tokenizer is a word by itself")
        self._words = list(words.values())
        self._numbers = torch.tensor(list(words), device=device)
        self._spellings: dict[str, list[int]] = defaultdict(list)
        for column, word in enumerate(self._words):
            self._spellings[word.casefold()].append(column)

    def propose(
        self, texts: Sequence[tuple[str, Sequence[Span]]], count: int, batch_size: int
    ) -> list[list[list[str]]]:
        """Of each text, for each of the words at these places (start, end), the `count` likeliest words; none where the
        word lies behind what the model can read."""
        found: list[list[list[str]]] = [[[] for _ in spans] for _, spans in texts]
        questions = [
            (len(ids), ids, mask, text, word)
            for text, (string, spans) in enumerate(texts)
            for word, mask, ids in self._masked(string, spans)
        ]
        for part in batched(sorted(questions), batch_size):
            spelled = [texts[text][0][slice(*texts[text][1][word])] for *_, text, word in part]
            answers = self._likeliest([ids for _, ids, *_ in part], [mask for _, _, mask, *_ in part], spelled, count)
            for (*_, text, word), words in zip(part, answers, strict=True):
                found[text][word] = words
        return found

    def _masked(self, text: str, spans: Sequence[Span]) -> Iterator[tuple[int, int, list[int]]]:
        """(number of the word, place of the mask, tokens of the text with it) for each word that has a token."""
        encoded = self._tokenizer(
            text,
            truncation=True,
            max_length=self._longest,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
        pieces = [(i, *offsets) for i, offsets in enumerate(encoded["offset_mapping"]) if not added[i]]
        for number, (start, end) in enumerate(spans):
            inside = [i for i, a, b in pieces if max(a, start) < min(b, end) or is_space_before(text, a, b, start)]
            if inside:
                yield number, inside[0], [*ids[: inside[0]], self._tokenizer.mask_token_id, *ids[inside[-1] + 1 :]]

    @torch.inference_mode()
    def _likeliest(
        self, ids: Sequence[list[int]], masks: Sequence[int], words: Sequence[str], count: int
    ) -> list[list[str]]:
        """The words for one mask in each of these lists of tokens, but for the words that stood there."""
        batch = pad([{"input_ids": one} for one in ids], self._tokenizer)
        logits: Tensor = self._model(**{name: tensor.to(self._device) for name, tensor in batch.items()}).logits
        scores = logits[torch.arange(len(ids)), torch.tensor(masks)].float()[:, self._numbers]  # (masks, whole words)
        for row, word in enumerate(words):
            scores[row, self._spellings.get(word.casefold(), [])] = -torch.inf
        best = scores.topk(min(count, len(self._words)))
        return [
            [self._words[column] for column, score in zip(columns, values, strict=True) if score > -torch.inf]
            for columns, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def is_space_before(text: str, start: int, end: int, word: int) -> bool:
    """Whether a piece is the space before a word and nothing else, as those of bytes and SentencePiece may be."""
    return end == word and not text[start:end].strip()


def whole_words(tokenizer: Any) -> dict[int, str]:
    """The tokens that are a word by themselves, by number: behind another, they are written with a space between. No
    special, added, or unused ones, and none without a letter or digit."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    left_out = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    numbers = sorted(set(tokenizer.get_vocab().values()) - left_out)
    start = f"{tokenizer.decode(before)} "
    written = tokenizer.batch_decode([[*before, number] for number in numbers])
    words = {
        number: text.removeprefix(start)
        for number, text in zip(numbers, written, strict=True)
        if text.startswith(start)
    }
    return {number: word for number, word in words.items() if WORD.fullmatch(word) and is_word(word)}


def is_word(text: str) -> bool:
    """Whether a letter or digit is in it."""
    return any(character.isalnum() for character in text)


def chosen_device(device: str) -> str:
    """`auto` is a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: needs auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load(name: str, device: str) -> Proposer:
    """The masked language model at a hub name or in a folder, which may be an artifact of this project.

    Raises:
        ConfigError: it cannot be loaded, is none, or was saved without its head; its tokenizer has no mask.
    """
    spec = Pretrained(name=name)
    try:
        tokenizer = spec.tokenizer()
        if tokenizer.mask_token_id is None:
            raise ConfigError(f"model.name={name!r}: its tokenizer has no mask token; needs a masked language model")
        if not tokenizer.is_fast:
            raise ConfigError(f"model.name={name!r}: its tokenizer does not tell where its tokens stand in a text")
        return Proposer(masked_model(spec), tokenizer, device)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.name=", "--model ")) from error


def masked_model(spec: Pretrained) -> Any:
    """The model with its trained head."""
    from transformers import AutoModelForMaskedLM

    config = spec.config()
    known: Any = AutoModelForMaskedLM._model_mapping
    kind = known.get(type(config), None)
    if artifact.is_artifact(spec.place):
        model = artifact.load(Path(spec.place)).model
        if type(model) is not kind:
            raise ConfigError(f"model.name={spec.name!r}: is a {type(model).__name__}, no masked language model")
        return model
    if kind is None:
        raise ConfigError(f"model.name={spec.name!r}: transformers has no masked {config.model_type} model")
    model, report = spec._try(
        lambda: kind.from_pretrained(
            spec.place, config=config, key_mapping=renamed(AutoModelForMaskedLM, config), dtype=torch.float32,
            output_loading_info=True,
        )
    )  # fmt: skip
    missing = [parameter for parameter, _ in model.named_parameters() if parameter in report["missing_keys"]]
    if missing:
        raise ConfigError(f"model.name={spec.name!r}: has no head of a masked language model ({missing[0]} is missing)")
    return model
