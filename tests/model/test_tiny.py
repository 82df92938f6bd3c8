"""Tiny models: of every family and task, the same from the same seed, with a tokenizer that loses nothing."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch

from niwaki.errors import ConfigError
from niwaki.model.tiny import FAMILIES, Tiny, pieces
from niwaki.task.classification import Classification


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_weights(family: str) -> None:
    load = lambda seed: Tiny(name=family).load(Classification(), ("a", "b"), seed).state_dict()  # noqa: E731
    first, again, other = load(0), load(0), load(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_from_the_network(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    spec = Tiny(name=family, overrides={"vocab_size": 200})
    assert spec.load(Classification(), ("a", "b"), 0).config.vocab_size == 200
    assert spec.empty(Classification(), ("a",) * 3).config.num_labels == 3


def test_the_tokenizer_reads_every_character_it_has() -> None:
    tokenizer = Tiny().tokenizer()
    ids = tokenizer("prune #7, wire!", add_special_tokens=False)["input_ids"]
    assert "[UNK]" not in tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.decode(ids).replace(" ", "") == "prune#7,wire!"
    assert len(set(pieces())) == len(pieces()) == Tiny().config().vocab_size == len(tokenizer)


def test_pairs_are_told_apart() -> None:
    encoded = Tiny().tokenizer()("a", "b")
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]


def test_refusal() -> None:
    with pytest.raises(ConfigError, match=r"^model\.name='gpt': needs one of bert, llama, "):
        Tiny(name="gpt")
