"""The head that transformers has for the family: a linear on the pooled text (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from niwaki.task.heads.head import Head


@dataclass(frozen=True, kw_only=True)
class Linear(Head):
    """logits = W pooled + b; W and b are new, so it says nothing before a fit."""

    guesses: ClassVar[bool] = False
    paper: ClassVar[str] = "Devlin et al. 2019, arXiv:1810.04805"


HEAD = Linear
