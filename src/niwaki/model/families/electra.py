"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): BERT's parts under the same names; no pooler."""

import dataclasses

from niwaki.model.families import bert

FAMILY = dataclasses.replace(bert.FAMILY, pooler=None)
