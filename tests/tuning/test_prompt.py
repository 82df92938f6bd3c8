"""Prompt tuning: where it starts, what learns, PEFT's own on the same embeddings, and whole runs to answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki import artifact, compose, inference, pipeline
from niwaki.errors import ArtifactError, ConfigError
from niwaki.model.load import Pretrained
from niwaki.tuning.prompt import PromptTuning
from niwaki.tuning.virtual import prompt_of

WIDTH = 32


def started(one: Any, tuning: Any, seed: int = 0) -> Any:
    context = one.context()
    context.seed = seed
    tuning.grow(one.model, context.anatomy)
    tuning.prepare(one.model, context)
    return context


def start(one: Any, tuning: Any, seed: int = 0) -> Tensor:
    started(one, tuning, seed)
    return prompt_of(one.model)().detach()


def test_random_is_uniform_and_follows_the_seed(setting: Callable[..., Any]) -> None:
    tuning = PromptTuning(tokens=200, init="random")
    drawn = start(setting(), tuning)
    assert drawn.shape == (200, WIDTH)
    assert float(drawn.min()) >= -0.5
    assert float(drawn.max()) <= 0.5
    assert abs(float(drawn.var()) - 1 / 12) < 0.003
    assert torch.equal(drawn, start(setting(), tuning))
    assert not torch.equal(drawn, start(setting(), tuning, seed=1))


def test_vocabulary_takes_rows_of_the_table_none_twice(setting: Callable[..., Any]) -> None:
    one = setting()
    tuning = PromptTuning(tokens=30, init="vocabulary")
    drawn = start(one, tuning)
    table = one.model.get_input_embeddings().weight
    rows = [int((table == row).all(1).nonzero()[0]) for row in drawn]
    assert len(set(rows)) == 30
    assert rows != sorted(rows)
    assert torch.equal(drawn, start(setting(), tuning))
    assert not torch.equal(drawn, start(setting(), tuning, seed=1))


def test_text_takes_its_tokens_in_order_and_again(setting: Callable[..., Any]) -> None:
    one = setting()
    drawn = start(one, PromptTuning(tokens=5, init="text", text="a b c"))
    ids = [one.tokenizer.convert_tokens_to_ids(x) for x in ("a", "b", "c", "a", "b")]
    assert torch.equal(drawn, one.model.get_input_embeddings().weight[ids])


def test_text_without_tokens_is_refused(setting: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"^tuning\.text='\\u200b': has no tokens for this model"):
        started(setting(), PromptTuning(init="text", text="\u200b"))


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "classification"), ("llama", "classification"), ("bert", "ner"), ("llama", "causal_lm")],
)
def test_n_times_the_width_learns_and_a_new_head(
    setting: Callable[..., Any], train: Callable[..., Any], family: str, task: str
) -> None:
    one = setting(family, task)
    context = started(one, PromptTuning(tokens=7))
    heads = set(context.anatomy.head_parameters()) if context.head_learns else set()
    learning = {name: p for name, p in one.model.named_parameters() if p.requires_grad}
    own = set(learning) - heads
    assert own == {{"bert": "bert", "llama": "model"}[family] + ".prompt.weight"}
    assert sum(learning[name].numel() for name in own) == 7 * WIDTH
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    train(one.learner(), [one.batch()] * 2)
    assert {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])} == set(learning)


def test_the_same_logits_as_pefts(setting: Callable[..., Any]) -> None:
    from peft import PromptTuningConfig, get_peft_model

    one, twin = setting("llama", "causal_lm"), setting("llama", "causal_lm")
    own = start(one, PromptTuning(tokens=6, init="random"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(twin.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    theirs.prompt_encoder["default"].embedding.weight.data = own.clone()
    inputs = one.task.inputs(one.batch())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(**inputs).logits[:, 6:]
    keep = inputs["attention_mask"].bool()
    assert torch.allclose(one.logits()[keep], expected[keep], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tokens": 0}, "tokens"), ({"init": "text"}, "text"), ({"init": "text", "text": "  "}, "text"),
        ({"init": "random", "text": "a"}, "text"), ({"text": "a"}, "text"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tuning\.{name}="):
        PromptTuning(**fields)


def test_more_tokens_than_the_vocabulary_has(setting: Callable[..., Any]) -> None:
    context = setting().context()
    with pytest.raises(ConfigError, match=r"^tuning\.tokens=300: the vocabulary has \d+ to start from; use init=ran"):
        PromptTuning(tokens=300).grow(context.anatomy.model, context.anatomy)


TUNINGS = ["prompt", "p_tuning", "prefix"]


def carried_out(folder: Path, task: str, tuning: str, rows: list[dict[str, Any]], steps: int, *more: str) -> Path:
    """A whole run on these rows; its artifact."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = "tiny-llama" if task == "causal_lm" else "tiny-bert"
    settings = [f"task={task}", f"model={model}", f"tuning={tuning}", "tuning.tokens=5", "data=files", *more]
    settings += [f"data.{split}={path}" for split in ("train", "validation", "test")]
    settings += [f"trainer.max_steps={steps}", "trainer.precision=fp32", "data.batch_size=4", "logger=none"]
    settings += ["callbacks=[]", "measure=scores", "task.max_length=32"]
    config = compose.compose(settings).config
    (folder / "run").mkdir()
    metrics = pipeline.run(compose.build(config), folder / "run", config)
    assert metrics["parity"] == 0.0
    return folder / "run" / "model"


@pytest.mark.parametrize("tuning", TUNINGS)
def test_entities_are_found_where_they_stand(tuning: str, tmp_path: Path) -> None:
    """Trained to tag `bob` wherever it stands, the loaded artifact gives its very characters."""
    places = [
        ["bob", "x", "yy"],
        ["x", "bob", "z"],
        ["yy", "z", "x", "bob"],
        ["z", "bob"],
        ["bob"],
        ["yy", "bob", "bob"],
    ]
    rows = [{"tokens": tokens, "tags": ["B-PER" if t == "bob" else "O" for t in tokens]} for tokens in places * 4]
    folder = carried_out(tmp_path, "ner", tuning, rows, 150, "optimizer.lr=0.05", "compression=[quantize/int8]")
    saved = artifact.load(folder)
    features = saved.task.encode({k: [r[k] for r in rows[:4]] for k in rows[0]}, saved.tokenizer, saved.labels)
    batch = saved.task.collate([dict(zip(features, v, strict=True)) for v in zip(*features.values(), strict=True)],
                               saved.tokenizer)  # fmt: skip
    with torch.no_grad():
        logits = saved.model(**saved.task.inputs(batch)).logits
    assert logits.shape[:2] == batch["labels"].shape
    texts = ["x z bob yy", "bob z", "z   bob\tx"]
    found = list(inference.answers(saved, [{"text": text} for text in texts], 2))
    for text, answer in zip(texts, found, strict=True):
        at = text.index("bob")
        assert [(e["start"], e["end"], text[e["start"] : e["end"]]) for e in answer["entities"]] == [
            (at, at + 3, "bob")
        ]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_language_model_writes_what_it_wrote_before_it_was_saved(tuning: str, tmp_path: Path) -> None:
    rows = [{"text": "a pine grows in the garden"}] * 4
    folder = carried_out(tmp_path, "causal_lm", tuning, rows, 3, "task.max_new_tokens=6")
    saved = artifact.load(folder)
    (one,) = inference.answers(saved, [{"text": "a pine"}], 1)
    ids = saved.tokenizer("a pine", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([torch.tensor([[saved.tokenizer.bos_token_id]]), ids], dim=1)
    start = ids.shape[1]
    while ids.shape[1] < start + 6 and int(ids[0, -1]) != saved.tokenizer.eos_token_id:  # greedy, from the whole text
        with torch.no_grad():
            best = saved.model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    assert one["generated"] == saved.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert ids.shape[1] > start
    source = inference.WholeFile(train=str(tmp_path / "rows.jsonl"))
    scores, _ = inference.scores(saved, source)
    assert scores["perplexity"] > 1


@pytest.mark.parametrize("tuning", TUNINGS)
def test_another_training_from_such_an_artifact_is_refused(tuning: str, tmp_path: Path) -> None:
    rows = [{"text": "yes", "label": "a"}, {"text": "no", "label": "b"}] * 4
    folder = carried_out(tmp_path, "classification", tuning, rows, 1)
    task, labels = artifact.load(folder).task, artifact.load(folder).labels
    with pytest.raises(ArtifactError, match=r"holds bert\..*(prompt|prefix)\.[^ ]*, which"):
        Pretrained(name=str(folder)).load(task, labels, 0)
