"""Attention with learned keys and values in front of the text's own.

transformers looks its attention function up by name for every call. Ours finds the prefix of the module that calls,
puts it before the keys and values that came, widens the mask, and hands all of it on. So a prefix takes no position,
no hidden state changes its length, and a cache holds the text alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy

NAME = "prefix"  # of the child that holds a prefix
UNDERLYING = ("sdpa", "eager")
PROBE = "niwaki_probe"
Shape = list[int]  # key heads, width of a key, width of a value


class Prefix(nn.Module):
    """Keys (heads, tokens, key width) and values (heads, tokens, value width) of one attention module.

    While a `writer` is there, it makes both, and there is no other parameter.
    """

    is_prompt: ClassVar[bool] = True

    def __init__(self, tokens: int, shape: Shape, device: Any = None) -> None:
        super().__init__()
        heads, of_key, of_value = shape
        self.sizes = (heads, tokens, of_key), (heads, tokens, of_value)
        self.key: nn.Parameter | None
        self.value: nn.Parameter | None
        self.settle(*(torch.zeros(size, device=device) for size in self.sizes))
        self.writer: nn.Module | None = None

    def settle(self, key: Tensor, value: Tensor) -> None:
        """Take these as the prefix from now on."""
        self.writer = None
        self.key, self.value = nn.Parameter(key.detach().clone()), nn.Parameter(value.detach().clone())

    def write_by(self, writer: nn.Module) -> None:
        """Let `writer` make the prefix: its output is (tokens, heads * (key width + value width))."""
        self.key = self.value = None
        self.writer = writer

    def forward(self) -> tuple[Tensor, Tensor]:
        if self.key is not None and self.value is not None:
            return self.key, self.value
        assert self.writer is not None
        (heads, tokens, of_key), (_, _, of_value) = self.sizes
        # In full precision, since what is saved is made so.
        with torch.autocast(next(self.writer.parameters()).device.type, enabled=False):
            written = self.writer().view(tokens, heads, of_key + of_value).transpose(0, 1)
        return written[..., :of_key], written[..., of_key:]


def prefixed(attend: Callable[..., Any], causal_without_mask: bool) -> Callable[..., Any]:
    """The attention function `attend` with the calling module's prefix before keys and values. `causal_without_mask`:
    whether `attend` takes a missing mask for a causal one where the module is causal."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> Any:
        learned = getattr(module, NAME, None)
        if learned is None:
            return attend(module, query, key, value, attention_mask, **settings)
        rows, length = key.shape[0], key.shape[2]  # a length would be one number for good where a model is traced
        before_key, before_value = (part.to(key.dtype).expand(rows, -1, -1, -1) for part in learned())
        tokens = before_key.shape[2]
        causal = settings.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if attention_mask is None and causal_without_mask and causal and query.shape[2] > 1:
            attention_mask = causal_mask(query.shape[2], length, key.device)
        if settings.get("position_bias") is not None:
            settings["position_bias"] = functional.pad(settings["position_bias"], (tokens, 0))
        key, value = torch.cat([before_key, key], dim=2), torch.cat([before_value, value], dim=2)
        return attend(module, query, key, value, widened(attention_mask, tokens), **settings)

    return attention


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, queries, keys): a position sees itself and what is before it."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def widened(mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask with `tokens` more keys in front, which every position sees; a mask of numbers is added to scores."""
    if mask is None:
        return None
    seen = mask.new_ones if mask.dtype is torch.bool else mask.new_zeros
    return torch.cat([seen(*mask.shape[:-1], tokens), mask], dim=-1)


def eager(module: nn.Module, *args: Any, **settings: Any) -> Any:
    """The plain attention function of the file that the module is from."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **settings)


def register() -> None:
    """Make the attention functions known to transformers under `with_prefix(...)`."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    for name, attend, mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", eager, eager_mask)):
        AttentionInterface.register(with_prefix(name), prefixed(attend, causal_without_mask=name == "sdpa"))
        AttentionMaskInterface.register(with_prefix(name), mask)


def attend_through(attention: Any, args: Any) -> None:
    """Hook before an attention module: whoever asks for another function (to see the weights, say) gets it with the
    prefix, which would be lost otherwise without a word. The masks of both are the same."""
    asked = attention.config._attn_implementation
    if asked in UNDERLYING:
        attention.config._attn_implementation = with_prefix(asked)


def with_prefix(implementation: str) -> str:
    """The name of the attention function that puts a prefix before `implementation`."""
    return f"{implementation}_with_prefix"


@dataclass(frozen=True, kw_only=True)
class AddPrefixes(Edit):
    """Put a prefix on each of these attention modules, and attend through it."""

    carried: ClassVar[bool] = False  # another training starts without, or is refused

    tokens: int
    shapes: dict[str, Shape]  # by the name of the attention module

    def apply(self, model: Any) -> None:
        register()
        for name, shape in self.shapes.items():
            attention = model.get_submodule(name)
            device = next(attention.parameters()).device
            attention.add_module(NAME, Prefix(self.tokens, shape, device))
            attention.register_forward_pre_hook(attend_through)
        model.set_attn_implementation(with_prefix(model.config._attn_implementation))


def attention_shapes(anatomy: Anatomy) -> dict[str, Shape]:
    """Every attention module that asks transformers for its function, with the shape of its keys and values; measured
    by a forward pass that attends to nothing, so it holds for any family, and after heads were pruned.

    Raises:
        ConfigError: the family computes attention in another way, or the model was set to another function.
    """
    from transformers import AttentionInterface

    model: Any = anatomy.model
    before, kind = model.config._attn_implementation, model.config.model_type
    if not model._can_set_attn_implementation() or before not in UNDERLYING:
        raise ConfigError(
            f"tuning=prefix: this {kind} model computes its attention in a way of its own ({before}), which takes no "
            "prefix; use tuning=prompt or tuning=p_tuning"
        )
    found: dict[int, Shape] = {}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        found[id(module)] = [key.shape[1], key.shape[3], value.shape[3]]
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(PROBE, attend)  # without a function for masks: none are made
    was_training = model.training
    model.set_attn_implementation(PROBE)
    try:
        with torch.no_grad():
            anatomy.backbone.eval()(**probe_inputs(anatomy))
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)
    return {name: found[id(module)] for name, module in model.named_modules() if id(module) in found}


def probe_inputs(anatomy: Anatomy) -> dict[str, Tensor]:
    """One short text for the backbone, of both sides where it has an encoder and a decoder."""
    backbone: Any = anatomy.backbone
    ids = torch.ones(1, 3, dtype=torch.long, device=next(backbone.parameters()).device)
    both = hasattr(backbone, "encoder") and hasattr(backbone, "decoder")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {"decoder_input_ids": ids} if both else inputs
