"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's parts under the same names."""

from niwaki.model.families.bert import FAMILY

__all__ = ["FAMILY"]
