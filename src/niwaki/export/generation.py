"""transformers' own search (greedy, beams) over the sessions of an export (Wolf et al. 2020, arXiv:1910.03771)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from niwaki.export.graphs import cache_of, tensors_of
from niwaki.export.runner import OnnxWriter


class Source(nn.Module):
    """The encoder: keys and values of a source, which the search repeats for each of its beams, once for all tokens."""

    def __init__(self, writer: OnnxWriter) -> None:
        super().__init__()
        self.encode = writer.encode

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> dict[str, Tensor]:
        return self.encode(input_ids, attention_mask)


class Search(PreTrainedModel, GenerationMixin):
    """A model without weights, whose forward is that of an exported file."""

    main_input_name = "input_ids"

    def __init__(self, writer: OnnxWriter) -> None:
        super().__init__(writer.config)
        self.place = writer.place
        self.writer = [writer]  # in a list: no part of this module
        self.generation_config = writer.generation_config

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """What generate calls first."""
        return Source(self.writer[0])

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, decoder_input_ids: Tensor | None = None,
        encoder_outputs: dict[str, Tensor] | None = None, **settings: Any,
    ) -> Any:  # fmt: skip
        """Logits of the next tokens, and the cache with them in it."""
        behind = encoder_outputs is not None
        ids = decoder_input_ids if behind else input_ids
        assert ids is not None
        own = past_key_values.self_attention_cache if behind else past_key_values
        seen = own.get_seq_length()
        writer = self.writer[0]
        past = dict(zip(writer.past, tensors_of(own), strict=True)) if seen else {}
        if attention_mask is None:  # as the search says it of a text without padding
            attention_mask = ids.new_ones(len(ids), seen + ids.shape[1])
        logits, found = writer.step(ids, attention_mask, past, encoder_outputs, position_ids)
        cache = cache_of(list(found.values()))
        # Beams of one row share a source, so its keys and values, which stay outside of the cache, need no new order.
        return CausalLMOutputWithPast(
            logits=logits, past_key_values=EncoderDecoderCache(cache, DynamicCache()) if behind else cache
        )
