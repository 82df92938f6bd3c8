"""Qwen2 (Yang et al. 2024, arXiv:2407.10671): Llama's parts under the same names."""

from niwaki.model.families.llama import FAMILY

__all__ = ["FAMILY"]
