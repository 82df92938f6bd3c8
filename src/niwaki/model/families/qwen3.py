"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): Llama's parts under the same names, and a norm of each query and key."""

from niwaki.model.families.llama import FAMILY

__all__ = ["FAMILY"]
