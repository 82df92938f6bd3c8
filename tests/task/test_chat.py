"""Talks as the tokenizers of published models read them: the tokens are those of the whole text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from written import batch_of, features

from niwaki.task import chat
from niwaki.task.instruction import Instruction
from niwaki.task.task import IGNORED

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "two or one?"},
    {"role": "assistant", "content": "two, be kind"},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)
# As Llama 2 has it: an answer stands behind a blank in running text.
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
    "{% else %}{{ '[' + message['role'] + '] ' + message['content'] + ' [end]' }}{% endif %}{% endfor %}"
)
WAYS = {
    "metaspace": (pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first")),
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
}


def tokenizer_of(way: str, template: str) -> Any:
    """A small one that has learned to merge the words of the talk."""
    before, behind = WAYS[way]
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = before, behind  # type: ignore[assignment]
    letters = [*"abcdefghijklmnopqrstuvwxyz_|<>[],?.!\n ", "\u2581"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if way == "bytes" else letters,
    )  # fmt: skip
    texts = [f"{message['role']} {message['content']}" for message in TALK] * 4
    plain.train_from_iterator([*texts, *["a\n\n\nb"] * (8 if way == "bytes" else 0)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=template,
    )  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, BRACKETS])
@pytest.mark.parametrize("way", list(WAYS))
def test_the_tokens_are_those_of_the_template(way: str, template: str) -> None:
    tokenizer = tokenizer_of(way, template)
    batch = batch_of(Instruction(), tokenizer, {"messages": [TALK]})
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert ids == whole[: len(ids)]
    assert tokenizer.decode(whole[len(ids) :]).strip() == ""
    runs = "".join(" # " if label == IGNORED else tokenizer.convert_ids_to_tokens(label) for label in labels)
    said = [part.replace("\u2581", " ").replace("\u0120", " ").strip() for part in runs.split(" # ") if part]
    end = "<|im_end|>" if template == CHATML else "</s>"
    assert said == [f"hello there{end}", f"two, be kind{end}"]
    assert [label for label in labels if label != IGNORED] == [
        token for token, label in zip(ids, labels, strict=True) if label != IGNORED
    ]


@pytest.mark.parametrize("template", [CHATML, BRACKETS])
@pytest.mark.parametrize("way", list(WAYS))
def test_what_is_asked_is_what_was_read_in_training(way: str, template: str) -> None:
    tokenizer = tokenizer_of(way, template)
    row = features(Instruction(), tokenizer, {"messages": [TALK]})[0]
    (asked,) = Instruction()._read({"messages": [TALK[:-1]]}, tokenizer)
    assert asked == row["input_ids"]
    assert asked == tokenizer.apply_chat_template(
        TALK[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("content", ["\n\nhello", "  hello", " \n hello there"])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_token_that_would_cross_into_an_answer_is_cut_there(way: str, content: str) -> None:
    """Line breaks of the template and of the answer would be one token of the bytes' kind."""
    tokenizer = tokenizer_of(way, CHATML)
    talk = [TALK[1], {"role": "assistant", "content": content}]
    row = features(Instruction(), tokenizer, {"messages": [talk]})[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(
        talk[:1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode([*row["input_ids"], *row["labels"]]).endswith(f"assistant\n{content}<|im_end|>")
    if way == "bytes" and content == "\n\nhello":
        whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert whole[: len(row["input_ids"])] != row["input_ids"]


def test_what_is_cut_off_is_no_beginning_of_a_text() -> None:
    """A token that holds a line break and a letter would cross; the rest has no blank before it."""
    plain = Tokenizer(models.BPE({"</s>": 0, "\u2581": 1, "a": 2, "\n": 3, "h": 4, "\nh": 5}, [("\n", "h")]))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    assert chat.encoded(["a\nha"], tokenizer) == [[1, 2, 5, 2]]
    assert chat.encoded(["a\n", "ha"], tokenizer) == [[1, 2, 3], [4, 2]]
    assert chat.encoded(["", "a", "\nh", "a\n", "ha"], tokenizer) == [[], [1, 2], [5], [2, 3], [4, 2]]
