"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's parts under the same names."""

import dataclasses

from niwaki.model.families import bert

FAMILY = dataclasses.replace(bert.FAMILY, positions_after_padding=True)
