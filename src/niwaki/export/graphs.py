"""A model as functions of tensors: whole, or a decoder with a cache, which writes texts, alone or behind an encoder.

Keys and values go in and out by the names that the field has for them (Hugging Face Optimum's): `past_key_values.0.key`
and `present.0.key`, with `decoder.` or `encoder.` before the last part where there are both.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.export.runner import PAST_NAME, PRESENT_NAME
from niwaki.model.anatomy import Anatomy

ROWS, SOURCE, TOKENS, PAST = 2, 4, 3, 5  # of what a cache is traced with; nothing may be one number for good


@dataclass(frozen=True)
class Function:
    """`module(*given)`, to be traced: which dimensions of what is given may have any size, and what all is called."""

    module: nn.Module
    given: tuple[Tensor, ...]
    sizes: tuple[dict[int, Any], ...]
    inputs: list[str]
    outputs: list[str]


class Logits(nn.Module):
    """A model as a function of its inputs, in their order, that gives logits alone."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.settings = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, *given: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, given, strict=True)), **self.settings).logits
        return logits


def whole(model: Any, example: Mapping[str, Tensor]) -> Function:
    """The inputs of a batch -> logits: any number of rows, and of tokens what the model reads."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=Anatomy.of(model).positions)
    names = list(example)
    sizes = tuple({0: batch, one.dim() - 1: length} for one in example.values())
    return Function(Logits(model, names).eval(), tuple(example.values()), sizes, names, ["logits"])


def decoder(model: Any) -> Function:
    """(input_ids, attention_mask, position_ids where the model takes them, keys and values of `past` tokens) ->
    (logits, keys and values of all tokens); `past` may be 0, so one graph does the first tokens and each that follows.
    The mask is of all tokens."""
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    with torch.no_grad():
        found = tensors_of(model(input_ids=ids, use_cache=True).past_key_values)
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    given = {"input_ids": ids, "attention_mask": torch.ones(ROWS, PAST + TOKENS, dtype=torch.long)}
    sizes: list[dict[int, Any]] = [{0: batch, 1: length}, {0: batch, 1: torch.export.Dim("total")}]
    if takes_positions(model):
        given["position_ids"] = torch.arange(PAST, PAST + TOKENS).expand(ROWS, -1).contiguous()
        sizes.append({0: batch, 1: length})
    names = names_of(len(found) // 2)
    given |= dict(zip(inputs_named(names), (lengthened(one, PAST) for one in found), strict=True))
    sizes += [{0: batch, 2: past}] * len(names)
    return Function(
        Decoder(model, list(given)).eval(), tuple(given.values()), tuple(sizes), list(given),
        ["logits", *outputs_named(names)],
    )  # fmt: skip


def encoder_and_decoder(model: Any) -> tuple[Function, Function]:
    """(input_ids, attention_mask) -> keys and values of every attention to the source; and (input_ids,
    encoder_attention_mask, keys and values of `past` tokens and of the source) -> (logits, keys and values of all
    tokens that were written).

    So the source is projected once for a text, no graph has a branch, and each linear stands in one of the two files.
    """
    ids, mask = (make(ROWS, SOURCE, dtype=torch.long) for make in (torch.zeros, torch.ones))
    start = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids, decoder_input_ids=start, use_cache=True).past_key_values
    own, cross = tensors_of(cache.self_attention_cache), tensors_of(cache.cross_attention_cache)
    batch, source, length, past = (torch.export.Dim(name) for name in ("batch", "source", "length", "past"))
    read = {"input_ids": ids, "attention_mask": mask}
    of_own, of_cross = (names_of(len(found) // 2, side) for found, side in ((own, "decoder."), (cross, "encoder.")))
    first = Function(
        Encoder(model).eval(), (ids, mask), ({0: batch, 1: source},) * 2, list(read), outputs_named(of_cross)
    )
    given = {
        "input_ids": start,
        "encoder_attention_mask": mask,
        **dict(zip(inputs_named(of_own), (lengthened(one, PAST) for one in own), strict=True)),
        **dict(zip(inputs_named(of_cross), cross, strict=True)),
    }
    sizes = (
        {0: batch, 1: length}, {0: batch, 1: source},
        *[{0: batch, 2: past}] * len(own), *[{0: batch, 2: source}] * len(cross),
    )  # fmt: skip
    second = Function(
        CrossDecoder(model, list(given)).eval(), tuple(given.values()), sizes, list(given),
        ["logits", *outputs_named(of_own)],
    )  # fmt: skip
    return first, second


class Decoder(nn.Module):
    """A model that reads from left to right, its cache as tensors."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, given, strict=True))
        past = [named.pop(name) for name in self.names if name.startswith(PAST_NAME)]
        found = self.model(**named, past_key_values=cache_of(past), use_cache=True)
        return found.logits, *tensors_of(found.past_key_values)


class Encoder(nn.Module):
    """What the decoder's attentions to the source read of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        ids, mask = given
        encoded = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        # Only keys and values of the source are asked of the decoder, so the rest of it is no part of the graph.
        found = self.model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids[:, :1], use_cache=True)
        return tuple(tensors_of(found.past_key_values.cross_attention_cache))


class CrossDecoder(nn.Module):
    """The decoder behind an encoder, both caches as tensors."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        named = dict(zip(self.names, given, strict=True))
        own, cross = (
            [named[name] for name in self.names if name.startswith(PAST_NAME) and f".{side}." in name]
            for side in ("decoder", "encoder")
        )
        cache = EncoderDecoderCache(cache_of(own), cache_of(cross))
        rows, _, source, _ = cross[0].shape
        encoded = BaseModelOutput(last_hidden_state=cross[0].new_zeros(rows, source, self.model.config.hidden_size))
        found = self.model(
            encoder_outputs=encoded, attention_mask=named["encoder_attention_mask"],
            decoder_input_ids=named["input_ids"], past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return found.logits, *tensors_of(found.past_key_values.self_attention_cache)


def names_of(layers: int, side: str = "") -> list[str]:
    """`0.key`, `0.value`, `1.key`, ..."""
    return [f"{layer}.{side}{part}" for layer in range(layers) for part in ("key", "value")]


def inputs_named(names: Iterable[str]) -> list[str]:
    """As a graph takes them."""
    return [f"{PAST_NAME}.{name}" for name in names]


def outputs_named(names: Iterable[str]) -> list[str]:
    """As a graph gives them."""
    return [f"{PRESENT_NAME}.{name}" for name in names]


def tensors_of(cache: Any) -> list[Tensor]:
    """Keys and values (rows, heads, tokens, width), layer by layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def cache_of(tensors: Sequence[Tensor]) -> Any:
    """A cache that keeps every token, also where a window of attention sees only the last ones: the mask hides them."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def lengthened(one: Tensor, tokens: int) -> Tensor:
    """Keys or values of so many tokens."""
    return torch.zeros(one.shape[0], one.shape[1], tokens, one.shape[3])


def takes_positions(model: Any) -> bool:
    """Whether the positions of tokens can be given to a model."""
    return "position_ids" in inspect.signature(model.forward).parameters


def refuse_virtual(anatomy: Anatomy) -> None:
    """Raise ConfigError where the first call of a decoder differs from all others."""
    if getattr(anatomy.backbone, "virtual_tokens", 0):
        raise ConfigError(
            "export.onnx.cache=true: virtual tokens are read in the first call alone, and one graph does all calls; "
            "needs false"
        )
