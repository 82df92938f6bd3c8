"""Where a parameter stands in a model: how deep below the head, in which part, and whether in a norm."""

from __future__ import annotations

from torch import nn

from niwaki.model.anatomy import Anatomy
from niwaki.model.embeddings import FactorizedEmbedding

NORMS = ("Norm", "norm")  # how the classes of norms end, in torch and in every family


def stacks(anatomy: Anatomy) -> list[list[nn.Module]]:
    """The blocks of each stack, bottom first."""
    return [anatomy.blocks_of(stack) for stack in anatomy.stacks]


def height(anatomy: Anatomy) -> int:
    """The number of blocks in the longest stack."""
    return max(map(len, stacks(anatomy)))


def depths(anatomy: Anatomy) -> dict[str, int]:
    """By the name of a parameter, how deep it lies: 0 above the blocks (final norm, pooler, head), 1 in the top block,
    L in the lowest of L, L + 1 in the embeddings, and in an output layer that is tied to them.

    Depth is counted within each stack: the last block of an encoder is 1 as that of its decoder is, since cross
    attention hands the encoder's end to every block of the decoder. The embeddings lie below the longest stack. A
    parameter that several blocks share has the depth of the highest. Adapters and prefixes have the depth of their
    block; virtual tokens, and what writes the prefixes of all blocks, that of the embeddings.
    """
    found: dict[int, int] = {}
    for blocks in stacks(anatomy):
        for index, block in enumerate(blocks):
            for parameter in block.parameters():
                depth = len(blocks) - index
                found[id(parameter)] = min(depth, found.get(id(parameter), depth))
    below = embedding_parameters(anatomy.backbone) | {id(p) for p in prompt_parameters(anatomy.model).values()}
    found = dict.fromkeys(below, height(anatomy) + 1) | found
    return {name: found.get(id(parameter), 0) for name, parameter in anatomy.model.named_parameters()}


def embedding_parameters(backbone: nn.Module) -> set[int]:
    """Identities of the parameters that embed, or belong to a module called after embeddings (their norm, their
    projection)."""
    kinds = (nn.Embedding, FactorizedEmbedding)
    tables = {id(p) for module in backbone.modules() if isinstance(module, kinds) for p in module.parameters()}
    return tables | {id(p) for name, p in backbone.named_parameters() if "embed" in name}


def prompt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, what is put before a text, and what writes it: all that is in modules that call themselves a prompt."""
    inside = {id(p) for module in model.modules() if getattr(module, "is_prompt", False) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in inside}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: by its type, or by how its class is called (LlamaRMSNorm, T5LayerNorm)."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(NORMS)


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Gains and shifts of all norms, by name."""
    inside = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if id(p) in inside}
