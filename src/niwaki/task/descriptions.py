"""Labels in words: what a head that goes by their meaning reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from niwaki.errors import ConfigError, nearest


def readable(label: str) -> str:
    """`card_arrival` as `card arrival`, `Sci/Tech` as `Sci Tech`, `topUpFailed` as `top Up Failed`."""
    parts = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return " ".join(re.sub(r"[_/\-]+", " ", parts).split()) or label


def described(labels: Sequence[str], given: Mapping[str, str]) -> list[str]:
    """For each label the text that was given for it, else its name made readable."""
    return [given.get(label, readable(label)) for label in labels]


def check_known(labels: Sequence[str], given: Mapping[str, str], field: str) -> None:
    """Raise ConfigError where a text was given for no label of the data, or a label is a mere number without one."""
    for name in given:
        if name not in labels:
            near = nearest(name, labels)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(f"{field}.{name}: the data has no such label{hint} (there are: {', '.join(labels[:8])})")
    mute = [label for label in labels if label not in given and not any(map(str.isalpha, label))]
    if mute:
        raise ConfigError(
            f"{field}: the label {mute[0]!r} has no word in it to go by; give one for each, such as "
            f"{field}={{{mute[0]}: what it means}}"
        )


def check_template(template: str, field: str) -> None:
    """Raise ConfigError unless there is one place for a description."""
    if template.count("{}") != 1:
        raise ConfigError(f"{field}={template!r}: needs {{}} once, where the description stands")
