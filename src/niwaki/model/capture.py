"""What flows through a model during a forward pass: the states between its blocks, and what its attentions compare.

Hooks sit on the modules that the anatomy names, so that adapters, links, prefixes and shared blocks change nothing.
Attention is seen where transformers looks its attention function up: queries and keys are per head, after norms of
their own and rotary positions, and before anything that a tuning puts in front of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import ConfigError
from niwaki.model.anatomy import Anatomy
from niwaki.tuning.prefixed_attention import UNDERLYING, causal_mask, eager, probe_inputs, with_prefix
from niwaki.weights import Packed

NAME = "recorder"  # of what a model, and each attention of it, knows its recorder by
PROBE = "niwaki_capture_probe"
_ASIDE: ContextVar[bool] = ContextVar("aside", default=False)


@dataclass
class Attention:
    """What one self-attention compared. `query` (rows, heads, positions, width), `key` and `value` (rows, key heads,
    positions, width), where grouped queries share a key head; `mask` and `bias` as the attention function got them."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scale: float
    causal: bool

    def scores(self) -> Tensor:
        """q k^T * scale + bias, before the softmax and without a mask: (rows, heads, positions, positions)."""
        groups = self.query.shape[1] // self.key.shape[1]
        scores = self.query.float() @ self.key.float().repeat_interleave(groups, 1).transpose(2, 3) * self.scale
        return scores if self.bias is None else scores + self.bias.float()

    def seen(self) -> Tensor:
        """Which positions each one attends to, padding aside where no mask tells: bool, broadcastable to `scores`."""
        if self.mask is None:
            length = self.query.shape[2]
            whole = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.query.device)
            return causal_mask(length, length, self.query.device) if self.causal else whole
        return self.mask if self.mask.dtype is torch.bool else self.mask > -1e4

    def without(self, tokens: int) -> Attention:
        """The same without the first `tokens` positions."""
        if not tokens:
            return self
        cut = [
            None if part is None else part[..., (tokens if part.shape[-2] > 1 else 0) :, tokens:]
            for part in (self.mask, self.bias)
        ]
        query, key, value = (part[:, :, tokens:] for part in (self.query, self.key, self.value))
        return Attention(query, key, value, cut[0], cut[1], self.scale, self.causal)


NOT_KEPT = torch.empty(0)


@dataclass
class Flow:
    """What went through one stack of blocks: `states` are what entered the first and what left each, (rows, positions,
    width), or NOT_KEPT in place of each where nobody asks; `attentions` are those of the text with itself, where they
    were asked for. Both in the order of the calls, so that a block which is used again counts again."""

    states: list[Tensor] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        return len(self.states) - 1


@dataclass
class Seen:
    """What a forward pass left: the flow through each stack, and what left the backbone, after its final norm."""

    flows: list[Flow]
    last: Tensor = field(default_factory=lambda: torch.empty(0))


class Recorder:
    """Keeps what flows through one model, from a forward pass to the next: of every pass with `always`, else of those
    that will have a backward pass, so that a validation costs nothing."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.always = False
        self.states: bool | None = None  # whether those between the blocks are kept; None: nobody has said
        self.seen: Seen | None = None
        self._open = False
        self._handles: list[Any] = []
        self._of_attention: list[Any] = []
        self._virtual = [self._virtual_tokens(place) for place in range(len(anatomy.stacks))]
        reader = reader_of(anatomy)
        self._handles.append(reader.register_forward_pre_hook(self._start))
        self._handles.append(last_of(anatomy, reader).register_forward_hook(self._end))
        for place, blocks in enumerate(map(anatomy.blocks_of, anatomy.stacks)):
            for block in blocks:
                self._handles.append(block.register_forward_hook(self._after_block(place), with_kwargs=True))

    @property
    def watches_attention(self) -> bool:
        return bool(self._of_attention)

    def watch_states(self, wanted: bool) -> None:
        """Keep the states between the blocks, or leave them where nobody else wants them."""
        self.states = wanted or bool(self.states)

    def watch_attention(self) -> None:
        """Keep queries, keys and values too."""
        if self.watches_attention:
            return
        for place, stack in enumerate(self.anatomy.stacks):
            for block in self.anatomy.blocks_of(stack):
                attention = block.get_submodule(stack.attention)
                attention.__dict__[NAME] = self, place
                self._of_attention.append(attention.register_forward_pre_hook(self._listen))
                self._of_attention.append(attention.register_forward_hook(self._stop_listening, always_call=True))

    def leave_attention(self) -> None:
        """Keep queries, keys and values no longer."""
        while self._of_attention:
            self._of_attention.pop().remove()

    def keep(self, place: int, attention: Attention) -> None:
        """Take what an attention of the stack at this place compared."""
        assert self.seen is not None
        self.seen.flows[place].attentions.append(attention.without(self._virtual[place]))

    def remove(self) -> None:
        """Take all hooks off the model."""
        self.leave_attention()
        for handle in self._handles:
            handle.remove()
        for module in self.anatomy.model.modules():
            module.__dict__.pop(NAME, None)
        self.seen = None

    def _virtual_tokens(self, place: int) -> int:
        """Positions in front of the text that a prompt and demonstrations take; of encoder and decoder the encoder
        alone reads them."""
        virtual = int(getattr(self.anatomy.backbone, "virtual_tokens", 0))
        return virtual + self.anatomy.tokens_shown if place == 0 else 0

    def _start(self, module: nn.Module, args: Any) -> None:
        self._open = self.always or torch.is_grad_enabled()
        self.seen = Seen([Flow() for _ in self._virtual]) if self._open else None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.seen is not None:
            self.seen.last = output[0][:, self.anatomy.tokens_shown :]
        self._open = False

    def _after_block(self, place: int) -> Callable[..., None]:
        tokens = self._virtual[place]

        def keep(module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
            if not self._open or self.seen is None:
                return
            states = self.seen.flows[place].states
            around = args[0] if args else given["hidden_states"], output[0] if isinstance(output, tuple) else output
            for state in around if not states else around[1:]:
                states.append(NOT_KEPT if self.states is False else state[:, tokens:])

        return keep

    def _listen(self, module: Any, args: Any) -> None:
        if self._open:
            module.config._attn_implementation = listening(module.config._attn_implementation)

    def _stop_listening(self, module: Any, args: Any, output: Any) -> None:
        asked = module.config._attn_implementation
        module.config._attn_implementation = asked.removesuffix(SUFFIX)


def reader_of(anatomy: Anatomy) -> nn.Module:
    """The backbone, or what it holds and does nothing but call: BART's language model goes past such a wrapper."""
    module = anatomy.backbone
    while len(children := list(module.children())) == 1:
        (module,) = children
    return module


def last_of(anatomy: Anatomy, reader: nn.Module) -> nn.Module:
    """What gives the last states first: the reader, or where it is the whole model (T5's language model has no module
    without the head), what holds the last stack of blocks."""
    if reader is not anatomy.model:
        return reader
    return reader.get_submodule(anatomy.stacks[-1].blocks.rpartition(".")[0])


SUFFIX = "_recorded"


def listening(implementation: str) -> str:
    """The name of the attention function that tells the recorder, then does what `implementation` does. The masks are
    made already when it is looked up."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"{implementation}{SUFFIX}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        attend = eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        AttentionInterface.register(name, recorded(attend))
    return name


def recorded(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function `attend`; what it is given goes to the recorder of the module that calls."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> Any:
        recorder, place = module.__dict__[NAME]
        given, causal = settings.get("scaling"), settings.get("is_causal")
        scale = query.shape[-1] ** -0.5 if given is None else float(given)
        causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
        bias = settings.get("position_bias")
        recorder.keep(place, Attention(query, key, value, attention_mask, bias, scale, causal))
        return attend(module, query, key, value, attention_mask, **settings)

    return attention


def recorder_of(anatomy: Anatomy) -> Recorder:
    """The recorder of a model, which all that look at the model share."""
    found: Recorder | None = anatomy.model.__dict__.get(NAME)
    if found is None:
        found = anatomy.model.__dict__[NAME] = Recorder(anatomy)
    return found


@contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """What was seen of the model before stays, whatever passes go through it meanwhile, and what gathers something of
    the batches of the fit gathers nothing of them."""
    recorder: Recorder | None = model.__dict__.get(NAME)
    before = recorder.seen if recorder else None
    token = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(token)
        if recorder:
            recorder.seen = before


def passes_aside() -> bool:
    """Whether a forward pass is of other texts than the batch of the fit."""
    return _ASIDE.get()


def tells_attention(anatomy: Anatomy) -> bool:
    """Whether the model asks transformers for its attention function, as everything that is recorded of it needs."""
    model: Any = anatomy.model
    known = {*UNDERLYING, *map(with_prefix, UNDERLYING)}
    return bool(model._can_set_attn_implementation()) and model.config._attn_implementation in known


def outline(anatomy: Anatomy) -> Seen:
    """What a forward pass of a short text leaves, for its shapes; the model may be empty (meta device). Attentions are
    in it where the model tells of them."""
    model: Any = anatomy.model
    present, recorder = NAME in model.__dict__, recorder_of(anatomy)
    before = recorder.always, recorder.watches_attention, recorder.states, model.training
    try:
        recorder.always = recorder.states = True
        if tells_attention(anatomy):
            recorder.watch_attention()
        with torch.no_grad(), shapes_alone(model), attending_to_nothing(anatomy):
            anatomy.backbone.eval()(**probe_inputs(anatomy))
        assert recorder.seen is not None
        return recorder.seen
    finally:
        recorder.always, watched, recorder.states, training = before
        model.train(training)
        if not watched:
            recorder.leave_attention()
        if not present:
            recorder.remove()


@contextmanager
def attending_to_nothing(anatomy: Anatomy) -> Iterator[None]:
    """Let the model attend to nothing, where it asks transformers for its function: an empty one can."""
    from transformers import AttentionInterface

    if not tells_attention(anatomy):
        yield
        return
    model: Any = anatomy.model
    before = model.config._attn_implementation
    AttentionInterface.register(PROBE, attend_to_nothing)  # without a function for masks: none are made
    model.set_attn_implementation(PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend_to_nothing(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """An attention function that gives zeros of the right shape."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


@contextmanager
def shapes_alone(model: nn.Module) -> Iterator[None]:
    """Let linears whose weight is stored as codes give anything of the right shape: an empty model has none to read."""
    packed: list[Any] = [module for module in model.modules() if isinstance(module, Packed)]
    for module in packed:
        module.forward = lambda values, wide=module.out_features: values.new_zeros(*values.shape[:-1], wide)
    try:
        yield
    finally:
        for module in packed:
            del module.forward


def refuse_attention(anatomy: Anatomy, method: str) -> None:
    """Raise ConfigError where the model does not tell what its attention compares."""
    if not tells_attention(anatomy):
        config: Any = anatomy.model.config
        raise ConfigError(
            f"{method}: a {config.model_type} model computes its attention in a way of its own "
            f"({config._attn_implementation}), which tells no queries and keys; use distill/hidden"
        )
