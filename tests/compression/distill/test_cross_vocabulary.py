"""Distillation across vocabularies: the distance by plain loops, whatever the order of the classes; rows that a teacher
reads in its own tokens; a fit between models with tokenizers of different kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lifecycle import look, recipe_of, write_rows
from trained import byte_pairs, folder, unigram, word_piece

from niwaki import artifact, compose, pipeline
from niwaki.compression.distill.cross_vocabulary import CrossVocabulary, from_start, shared_places
from niwaki.compression.distill.distillation import Term
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.model.teacher import Said, Teacher
from niwaki.stage import refuse_conflicts
from niwaki.task.causal_lm import CausalLM, parted


def by_hand(student: list[list[float]], teacher: list[list[float]]) -> float:
    total = 0.0
    for q, p in zip(student, teacher, strict=True):
        q, p = sorted(q, reverse=True), sorted(p, reverse=True)
        for i in range(max(len(q), len(p))):
            total += abs((q[i] if i < len(q) else 0.0) - (p[i] if i < len(p) else 0.0))
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_formula(temperature: float) -> None:
    student, teacher = torch.randn(4, 5), 3 * torch.randn(4, 9)
    found = CrossVocabulary(teacher="x", temperature=temperature).compare_tokens(student, teacher)
    chances = [torch.softmax(logits / temperature, -1).tolist() for logits in (student, teacher)]
    assert found.item() == pytest.approx(by_hand(*chances), rel=1e-5)


def test_worked_by_hand() -> None:
    # teacher (3/4, 1/4), student (1/2, 1/4, 1/4): 1/4 + 0 + 1/4
    student, teacher = torch.tensor([[0.25, 0.5, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert CrossVocabulary(teacher="x").compare_tokens(student, teacher).item() == pytest.approx(0.5)


def test_names_of_classes_do_not_matter_and_it_has_a_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    shuffled = logits.detach()[:, torch.randperm(7)]
    measure = CrossVocabulary(teacher="x").compare_tokens
    assert measure(logits, shuffled).item() == pytest.approx(0.0, abs=1e-6)
    measure(logits, torch.zeros(3, 2)).backward()
    assert bool(logits.grad.any())  # type: ignore[union-attr]


def test_places_that_both_have() -> None:
    rows = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 2, 2, 2])
    ours, theirs = shared_places(*((one, from_start(one)) for one in rows))
    assert ours.tolist() == [0, 1, 4, 5]
    assert theirs.tolist() == [0, 1, 2, 3]
    words = torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([0, 2, 0, 2, 3])
    ours, theirs = shared_places(*zip(rows, words, strict=True))
    assert ours.tolist() == [0, 2, 4]
    assert theirs.tolist() == [0, 1, 2]


def test_a_word_that_one_tokenizer_has_no_piece_of(setting: Callable[..., Any]) -> None:
    """Each side says the tag of each word: they agree, whichever words they see."""
    one = setting("bert", "ner")
    rows = {
        "tokens": [["ada", "\u200b", "met", "alan"], ["so", "said", "bob"]],
        "tags": [["B-PER", "O", "I-PER", "O"], ["O", "I-PER", "B-PER"]],
    }
    batches, counts = [], []
    for tokenizer in (word_piece(), byte_pairs()):
        columns = one.task.encode(rows, tokenizer, one.labels)
        features = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batches.append(one.task.collate(features, tokenizer))
        counts.append(int((batches[-1]["labels"] != -100).sum()))
    assert counts == [6, 7]
    lesson = CrossVocabulary(teacher="x").lesson(one.context(), SimpleNamespace())  # type: ignore[arg-type]

    def says(batch: dict[str, torch.Tensor], shift: int = 0) -> Said:
        tags = (batch["labels"].clamp(min=0) + shift) % 3
        return Said(SimpleNamespace(logits=9.0 * torch.nn.functional.one_hot(tags, 3)), None, batch)

    for ours, theirs in (batches, batches[::-1]):
        assert lesson.compare(says(ours), says(theirs), ours).item() == pytest.approx(0.0, abs=1e-6)
        assert lesson.compare(says(ours), says(theirs, shift=1), ours).item() > 1


@pytest.mark.parametrize(("family", "task"), [("llama", "causal_lm"), ("bert", "classification"), ("bert", "ner")])
def test_padding_does_not_count(setting: Callable[..., Any], family: str, task: str) -> None:
    one, other = setting(family, task), setting(family, task, seed=1)
    for parameter in other.model.parameters():
        parameter.data *= 3
    context = one.context(load_teacher=lambda *_: Teacher(other.model))
    (term,) = CrossVocabulary(teacher="there", weight=0.5).prepare(one.model, context).terms.values()
    assert isinstance(term, Term)
    batch = one.numbered()
    outputs = one.model(**one.task.inputs(batch))
    logits = [one.task.predictions(o, batch) for o in (outputs, other.model(**one.task.inputs(batch)))]
    if task == "causal_lm":
        expected = by_hand(*[torch.softmax(x, -1).tolist() for x in logits])
    else:
        p, q = (torch.log_softmax(x, -1) for x in reversed(logits))
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert expected > 1e-3
    assert term(outputs, batch).item() == pytest.approx(0.5 * expected, rel=1e-4)


def test_what_is_hidden_stands_elsewhere_in_other_tokens() -> None:
    settings = ["compression=[distill/cross_vocabulary]", "compression.cross_vocabulary.teacher=x"]
    with pytest.raises(
        ConfigError, match=r"^distill/cross_vocabulary: what is hidden from the student stands elsewhere"
    ):
        look(recipe_of("masked_lm", "rows.txt", *settings))
    look(recipe_of("ner", "rows.conll", "task.overlap=null", *settings))


def test_a_block_in_other_tokens_is_the_same_text() -> None:
    first, second = byte_pairs(), word_piece()
    texts = ["the old pine stands", "cut the pine in autumn"]
    rows = CausalLM(max_length=64).encode({"text": texts}, first, ())
    (block,) = CausalLM(max_length=64).translate(rows, first, second, ())["input_ids"]
    assert [second.decode(part) for part in parted(block, second.bos_token_id)] == ["", *texts]
    (cut,) = CausalLM(max_length=5).translate(rows, first, second, ())["input_ids"]
    assert cut == block[:5]


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_rows_are_read_one_for_one(tmp_path: Path, task: str) -> None:
    recipe = recipe_of(task, write_rows(tmp_path)[task], *(["task.overlap=null"] if task == "ner" else []))
    corpus = Corpus.read(recipe.task, recipe.data, word_piece(), 0)
    other = unigram()
    read = corpus.read_by(other)(torch.tensor([5, 0]))
    alone = recipe.task.encode(
        {k: [corpus.rows["train"][i][k] for i in (5, 0)] for k in corpus.columns}, other, corpus.labels
    )
    features = [dict(zip(alone, values, strict=True)) for values in zip(*alone.values(), strict=True)]
    expected = recipe.task.collate(features, other)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected if name != "sentence")


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_student_learns_from_a_teacher_of_another_vocabulary(tmp_path: Path, task: str) -> None:
    family = "bert" if task == "classification" else "llama"
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"a rose is red {i}", "label": "ab"[i % 2]} for i in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student, teacher = (
        folder(
            tmp_path / name, family, task, kind(), num_labels=2, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
        )
        for name, kind in (("student", word_piece), ("teacher", unigram))
    )

    def run(name: str, place: Path, *more: str) -> Any:
        config = compose.compose(
            [f"task={task}", "model=pretrained", f"model.name={student}", "data=files", "logger=none", "callbacks=[]",
             "measure=scores", *(f"data.{split}={file}" for split in ("train", "validation", "test")),
             "trainer.max_steps=4", "data.batch_size=4", "task.max_length=16", "trainer.precision=fp32", *more,
             "optimizer.lr=1e-3", f"compression.{name}.teacher={place}", f"compression=[distill/{name}]"]
        ).config  # fmt: skip
        (tmp_path / "run").mkdir(exist_ok=True)
        return pipeline.run(compose.build(config), tmp_path / "run", config)

    with pytest.raises(
        ConfigError, match="use distill/cross_vocabulary, whose teacher reads the rows in tokens of its own"
    ):
        run("logits", teacher)
    with pytest.raises(ConfigError, match="has the student's vocabulary; use distill/logits"):
        run("cross_vocabulary", student)
    short = folder(
        tmp_path / "short", family, task, unigram(), num_labels=2, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1},
        max_position_embeddings=12,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^task\.max_length=16: the teacher .* reads at most 12 tokens"):
        run("cross_vocabulary", short)
    assert run("cross_vocabulary", teacher, "task_weight=0")["parity"] == 0.0
    learned = artifact.load(tmp_path / "run" / "model").model
    before = dict(type(learned).from_pretrained(student).named_parameters())
    moved = {name for name, value in learned.named_parameters() if not torch.equal(value, before[name])}
    assert len(moved) > 10


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"^compression\.cross_vocabulary\.teacher: needs"):
        refuse_conflicts([CrossVocabulary()])
    with pytest.raises(ConfigError, match=r"^compression\.cross_vocabulary\.teacher: needs"):
        refuse_conflicts([CrossVocabulary(teacher="auto")])
    with pytest.raises(ConfigError, match=r"^compression\.cross_vocabulary\.temperature=0\.0: needs"):
        CrossVocabulary(teacher="x", temperature=0.0)
