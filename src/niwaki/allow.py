"""Which classes a text file may name: only those of this project (and Lightning's callbacks), by kind.

A config or an artifact is data from elsewhere. The name is judged before anything is imported, and the object that
it leads to is judged again, so that an alias (`niwaki.artifact.os.system`) gets no further than the name itself.
"""

from __future__ import annotations

import importlib
from typing import Any

from niwaki.errors import ConfigError

PACKAGES = ("niwaki", "pytorch_lightning")


def resolve(target: str, kinds: tuple[type, ...], field: str = "_target_") -> Any:
    """The class that the dotted name `target` stands for.

    Raises:
        ConfigError: the name is outside the allowed packages, leads nowhere, or is no subclass of `kinds`.
    """
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or parts[0] not in PACKAGES or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{field}={target!r}: only classes of {' and '.join(PACKAGES)} may be named here")
    module = ".".join(parts[:-1])
    try:
        found = getattr(importlib.import_module(module), parts[-1], None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        found = None
    if found is None:
        raise ConfigError(f"{field}={target!r}: there is no such class")
    ours = isinstance(found, type) and found.__module__.split(".")[0] in PACKAGES
    if not ours or not issubclass(found, kinds):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{field}={target!r}: not one of the kinds allowed here ({names})")
    return found
