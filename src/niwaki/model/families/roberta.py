"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's parts under the same names."""

import dataclasses
from typing import Any

from niwaki.model.families import bert


def positions(config: Any) -> int:
    """Position numbers start behind that of the padding token."""
    return int(config.max_position_embeddings - config.pad_token_id - 1)


FAMILY = dataclasses.replace(bert.FAMILY, positions=positions)
