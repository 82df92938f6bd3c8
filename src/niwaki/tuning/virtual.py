"""Virtual tokens: learned embeddings that a model reads before the embeddings of every text.

They go through the whole backbone and are cut from what leaves it, so heads, labels and offsets see the text alone.
With a cache they are read once, with the first tokens; what comes later finds them there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from niwaki.edits import Edit
from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy

NAME = "prompt"  # of the child that holds the virtual tokens
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Prompt(nn.Module):
    """The embeddings of the virtual tokens, `weight` (tokens, width); while an `encoder` is there, it makes them, and
    there is no other parameter. Its methods are hooks of the module that reads them."""

    is_prompt: ClassVar[bool] = True

    def __init__(self, tokens: int, width: int, first_position: int, device: Any = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.first_position = first_position
        self.weight: nn.Parameter | None
        self.settle(torch.zeros(tokens, width, device=device))
        self.encoder: nn.Module | None = None
        self._read = False  # in the forward pass that goes on

    def settle(self, weight: Tensor) -> None:
        """Take these as the virtual tokens from now on."""
        self.encoder = None
        self.weight = nn.Parameter(weight.detach().clone())

    def encode_by(self, encoder: nn.Module) -> None:
        """Let `encoder` make the virtual tokens: its output is (tokens, width)."""
        self.weight = None
        self.encoder = encoder

    def forward(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        assert self.encoder is not None
        # In full precision, since what is saved is made so.
        with torch.autocast(next(self.encoder.parameters()).device.type, enabled=False):
            return self.encoder()

    def insert(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Inputs:
        """Hook before `module`: virtual tokens before the text, in embeddings, mask, segments and positions."""
        names = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(names, args, strict=False)) | given
        cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        self._read = cache is None or not int(cache.get_seq_length())
        order = None if mask is None else self.order(mask)
        if mask is not None:
            inputs["attention_mask"] = self.longer(mask, 1, order)
        if self._read:
            inputs |= self._before(module, inputs, order)
        positions = self._positions(inputs, order)
        if positions is not None and "position_ids" in names:
            inputs["position_ids"] = positions
        return (), inputs

    def order(self, mask: Any) -> Tensor:
        """Where each position of (virtual tokens, text) stands: they come right before the first token of a row, behind
        padding on its left, so that a window or a distance is the same with padding as without. (rows, positions)"""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("virtual tokens need a mask of shape (rows, positions), not one of another kind")
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        index = torch.arange(self.tokens + mask.shape[1], device=mask.device)
        behind = torch.where(index < padding + self.tokens, index - padding, index)
        return torch.where(index < padding, index + self.tokens, behind)

    def longer(self, values: Tensor, fill: int, order: Tensor | None) -> Tensor:
        """A mask or segments (rows, positions), with `fill` for the virtual tokens."""
        joined = functional.pad(values, (self.tokens, 0), value=fill)
        return joined if order is None else joined.gather(1, order)

    def _before(self, module: Any, inputs: dict[str, Any], order: Tensor | None) -> dict[str, Any]:
        """The embeddings and the segments, if there are any, with those of the virtual tokens."""
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(inputs["input_ids"])
        joined = torch.cat([self().to(embeds.dtype).expand(len(embeds), -1, -1), embeds], dim=1)
        if order is not None:
            joined = joined.gather(1, order[..., None].expand_as(joined))
        changed = {"input_ids": None, "inputs_embeds": joined}
        if inputs.get("token_type_ids") is not None:
            changed["token_type_ids"] = self.longer(inputs["token_type_ids"], 0, order)
        return changed

    def _positions(self, inputs: dict[str, Any], order: Tensor | None) -> Tensor | None:
        """Virtual tokens have the first positions, the text those that follow, wherever padding stands; None where no
        mask tells: the model counts on by itself."""
        given, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if given is not None and self._read:
            own = torch.arange(self.tokens, device=given.device).expand(len(given), -1) + self.first_position
            joined = torch.cat([own, given + self.tokens], dim=1)
            return joined if order is None else joined.expand(len(order), -1).gather(1, order)
        if given is not None:
            return given + self.tokens
        if mask is None:
            return None
        present = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        counted = (mask.long().cumsum(1) - 1).clamp(min=0)
        return counted[:, -present.shape[1] :] + self.first_position

    def cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook behind `module`: everything with a position for each token without the virtual ones."""
        if not self._read:
            return output
        length = output[0].shape[1] - self.tokens
        return shortened(output, self.tokens, length)

    def cut_rest(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        """Hook behind a `module` whose hidden states are cut inside of it: the same for all that it gives beside."""
        if not self._read:
            return output
        return shortened(output, self.tokens, given["inputs_embeds"].shape[1] - self.tokens)

    def widen(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Inputs:
        """Hook before a decoder: its cross attention sees the virtual tokens that the encoder read."""
        names = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(names, args, strict=False)) | given
        mask = inputs.get("encoder_attention_mask")
        if mask is not None:
            inputs["encoder_attention_mask"] = self.longer(mask, 1, self.order(mask))
        return (), inputs


def shortened(value: Any, tokens: int, length: int) -> Any:
    """`value` without the first `tokens` positions of hidden states (rows, positions, width), and of attentions (rows,
    heads, positions, positions) on both axes; anything else as it is."""
    if isinstance(value, dict):
        for name, part in list(value.items()):
            value[name] = shortened(part, tokens, length)
    elif isinstance(value, tuple | list):
        return type(value)(shortened(part, tokens, length) for part in value)
    elif isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == tokens + length:
        return value[:, tokens:]
    elif isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:] == (tokens + length, tokens + length):
        return value[:, :, tokens:, tokens:]
    return value


@dataclass(frozen=True, kw_only=True)
class AddPrompt(Edit):
    """Put virtual tokens before every text: in the backbone, or in its encoder where it has a decoder beside it."""

    carried: ClassVar[bool] = False  # another training starts without, or is refused

    tokens: int

    def apply(self, model: Any) -> None:
        backbone = model.base_model
        reader = reader_of(backbone)
        embeddings = reader.get_input_embeddings().weight
        prompt = Prompt(self.tokens, embeddings.shape[1], first_position(reader), embeddings.device)
        reader.add_module(NAME, prompt)
        backbone.virtual_tokens = self.tokens  # for the anatomy: they take positions from every text
        reader.register_forward_pre_hook(prompt.insert, with_kwargs=True)
        if reader is not backbone and hasattr(backbone, "encoder"):
            backbone.decoder.register_forward_pre_hook(prompt.widen, with_kwargs=True)
            return
        if getattr(backbone, "pooler", None) is not None:  # it reads the first token of the text, so cut before it
            backbone.encoder.register_forward_hook(prompt.cut)
        reader.register_forward_hook(prompt.cut_rest, with_kwargs=True)


def reader_of(backbone: Any) -> Any:
    """The module that reads the text: the encoder where there is a decoder beside it, a decoder that stands alone in a
    wrapper (BART's language model goes past that), else the backbone."""
    if not hasattr(backbone, "decoder"):
        return backbone
    return backbone.encoder if hasattr(backbone, "encoder") else backbone.decoder


def first_position(reader: nn.Module) -> int:
    """The position number of a first token: RoBERTa's begin behind that of the padding token."""
    for name, module in reader.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def add_prompt(model: nn.Module, anatomy: Anatomy, tokens: int) -> list[Edit]:
    """Put virtual tokens into the model; the edits that do it.

    Raises:
        ConfigError: they would leave no position for a text, or the model takes no embeddings.
    """
    kind = model.config.model_type  # type: ignore[union-attr]
    if anatomy.positions is not None and tokens >= anatomy.positions:
        raise ConfigError(f"tuning.tokens={tokens}: leaves no room for a text; the model reads {anatomy.positions}")
    if "inputs_embeds" not in inspect.signature(reader_of(anatomy.backbone).forward).parameters:
        raise ConfigError(f"tuning.tokens={tokens}: a {kind} model takes no embeddings for tokens; use tuning=lora")
    edit = AddPrompt(tokens=tokens)
    edit.apply(model)
    return [edit]


def prompt_of(model: nn.Module) -> Prompt:
    """The virtual tokens of a model that has some."""
    return next(module for module in model.modules() if isinstance(module, Prompt))
