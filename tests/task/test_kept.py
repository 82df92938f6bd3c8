"""What is kept of a tokenizer goes with it, and is computed anew where it has learned a token."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from niwaki.model.tiny import Tiny
from niwaki.task.kept import kept


def test_once_while_the_tokenizer_lives_and_stays_as_it_is() -> None:
    calls: list[tuple[Any, ...]] = []

    @kept
    def known(tokenizer: Any, word: str) -> int:
        calls.append((len(tokenizer), word))
        return int(tokenizer.convert_tokens_to_ids(word))

    first, second = (Tiny(name="t5").tokenizer() for _ in range(2))
    assert known(first, "a") == known(first, "a") == known(second, "a")
    assert known(first, "b") != known(first, "a")
    assert len(calls) == 3
    before = known(first, "newword")
    first.add_tokens(["newword"])
    assert known(first, "newword") != before
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
