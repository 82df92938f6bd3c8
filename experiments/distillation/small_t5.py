"""Write a small random T5 that reads with the tokenizer of another model.

.venv/bin/python experiments/distillation/small_t5.py MODEL FOLDER
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration


def main(place: str, folder: str) -> None:
    """Three blocks of width 128 on each side."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=512, num_layers=3, num_decoder_layers=3, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, dropout_rate=0.1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
