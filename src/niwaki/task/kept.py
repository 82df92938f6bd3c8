"""What is computed of a tokenizer once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

P = ParamSpec("P")
R = TypeVar("R")


def kept(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a tokenizer, and of more that can be hashed, whose result is kept while the tokenizer lives and
    knows as many tokens."""
    found: WeakKeyDictionary[Any, dict[Any, R]] = WeakKeyDictionary()

    @wraps(function)
    def inner(*given: P.args, **named: P.kwargs) -> R:
        tokenizer, *rest = tuple[Any, ...](given)
        key = (len(tokenizer), *rest, *sorted(named.items()))
        own = found.setdefault(tokenizer, {})
        if key not in own:
            own[key] = function(*given, **named)
        return own[key]

    return inner
