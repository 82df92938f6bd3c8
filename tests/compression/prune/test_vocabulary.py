"""Vocabulary trimming: the same answers where the tokens stay, smaller files, nothing else changed; tokenizers of three
kinds, classifiers and language models, teachers of the whole vocabulary."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trained import KINDS, OTHERS, TEXTS, byte_pairs, folder, word_piece

from niwaki import artifact, compose, pipeline
from niwaki.compression.distill.logits import softened_divergence
from niwaki.compression.prune.vocabulary import Vocabulary, named_by, refuse_shifted_positions
from niwaki.data import tokens
from niwaki.data.corpus import Corpus
from niwaki.errors import ConfigError
from niwaki.model.embeddings import KeepTokens
from niwaki.model.load import Pretrained
from niwaki.pipeline import assemble, context_of, read

ROWS = {"train": TEXTS[:3], "validation": [TEXTS[3], OTHERS[0]], "test": [TEXTS[0], OTHERS[1], OTHERS[2]]}
FAMILIES = {"WordPiece": "bert", "BPE": "modernbert", "Unigram": "t5"}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The settings that name the rows."""
    for split, texts in ROWS.items():
        rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts * 2 if split == "train" else texts)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=files", "data.batch_size=4", *(f"data.{split}={tmp_path / split}.jsonl" for split in ROWS)]


def recipe_of(task: str, model: Path, files: list[str], *settings: str) -> Any:
    chosen = [] if any(s.startswith("compression=") for s in settings) else ["compression=[prune/vocabulary]"]
    return compose.build(
        compose.compose(
            [
                f"task={task}", "task.max_length=64", "model=pretrained", f"model.name={model}", "logger=none", *files,
                "trainer.max_epochs=0", "trainer.precision=fp32", "measure=scores", "callbacks=[]", *chosen, *settings,
            ]
        ).config
    )  # fmt: skip


def run(recipe: Any, place: Path, config: dict[str, Any]) -> dict[str, Any]:
    place.mkdir(exist_ok=True)
    return pipeline.run(recipe, place, config)


def whole_model(recipe: Any) -> Any:
    """The model as it is loaded, and its tokenizer."""
    corpus = Corpus.read(recipe.task, recipe.data, recipe.model.tokenizer(), recipe.seed)
    return recipe.model.load(recipe.task, corpus.labels, recipe.seed).eval(), corpus.tokenizer


def logits(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_says_the_same(kind: str, files: list[str], tmp_path: Path) -> None:
    """Of every text that is read in kept tokens; the file is smaller by the rows that are gone."""
    family = FAMILIES[kind]
    place = folder(tmp_path / "hf", family, "classification", KINDS[kind]())
    recipe = recipe_of("classification", place, files)
    metrics = run(recipe, tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    model, whole = whole_model(recipe)
    kept = saved.edits[-1].numbers  # type: ignore[attr-defined]
    assert metrics["parity"] == 0
    assert metrics["tokens"] == {"before": len(whole), "after": len(kept)}
    assert len(saved.tokenizer) == len(kept) < len(whole) == model.config.vocab_size
    same = 0
    for text in [*TEXTS, *OTHERS, "the garden"]:
        if set(whole(text)["input_ids"]) <= set(kept):
            same += 1
            found = logits(saved.model, saved.tokenizer, text)
            assert torch.allclose(found, logits(model, whole, text), atol=1e-6)
        else:
            assert torch.isfinite(logits(saved.model, saved.tokenizer, text)).all()
    assert same >= len(ROWS["train"]) + 1
    elements = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / artifact.WEIGHTS).values())
    before = sum(tensor.numel() for tensor in artifact.unique_tensors(model).values())
    assert before - elements == (len(whole) - len(kept)) * 32


def test_a_fresh_process_answers_as_the_whole_model_does(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "bert", "classification", word_piece())
    recipe = recipe_of("classification", place, files)
    run(recipe, tmp_path, {})
    model, whole = whole_model(recipe)
    rows = [{"text": text} for text in ROWS["train"]]
    with torch.no_grad():
        expected = list(recipe.task.answers(model, whole, ("a", "b"), rows))
    command = [sys.executable, "-m", "niwaki.cli", "predict", str(tmp_path), *ROWS["train"]]
    code = "import sys; from niwaki.cli import main; sys.argv = ['niwaki', *sys.argv[1:]]; main()"
    done = subprocess.run([sys.executable, "-c", code, *command[3:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("bart", False)])
def test_a_language_model_chooses_among_what_is_left(family: str, tied: bool, files: list[str], tmp_path: Path) -> None:
    """Its logits are those columns of the whole model's, so log p is renormalised over the kept tokens."""
    place = folder(tmp_path / "hf", family, "causal_lm", byte_pairs(), tie_word_embeddings=tied)
    recipe = recipe_of("causal_lm", place, files)
    metrics = run(recipe, tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    model, whole = whole_model(recipe)
    kept = torch.tensor(saved.edits[-1].numbers)  # type: ignore[attr-defined]
    assert metrics["after"]["parameters"] == sum(p.numel() for p in model.parameters()) - (
        len(whole) - len(kept)
    ) * 32 * (1 if tied else 2)
    text = ROWS["train"][1]
    found, expected = logits(saved.model, saved.tokenizer, text), logits(model, whole, text)
    assert torch.allclose(found, expected[..., kept], atol=1e-6)
    stream = [
        token for line in [*ROWS["test"]] for token in (saved.tokenizer.bos_token_id, *ids(saved.tokenizer, line))
    ]
    with torch.no_grad():
        scores = model(input_ids=kept[torch.tensor([stream])]).logits[0, :-1][:, kept].double()
    total = 0.0
    for row, token in zip(scores, stream[1:], strict=True):
        total -= float(row[token] - torch.logsumexp(row, 0))
    assert metrics["after"]["test"]["perplexity"] == pytest.approx(math.exp(total / (len(stream) - 1)), rel=1e-4)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_language_model_writes_what_the_whole_one_would_with_these_tokens(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "llama", "causal_lm", byte_pairs())
    recipe = recipe_of("causal_lm", place, files, "task.max_new_tokens=12")
    run(recipe, tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    model, whole = whole_model(recipe)
    kept = saved.edits[-1].numbers  # type: ignore[attr-defined]
    text = ROWS["train"][0]
    written = [whole.bos_token_id, *ids(whole, text)]
    start = len(written)
    with torch.no_grad():
        while len(written) < start + 12 and (len(written) == start or written[-1] != whole.eos_token_id):
            scores = model(input_ids=torch.tensor([written])).logits[0, -1]
            written.append(max(kept, key=lambda token: float(scores[token])))
        answer = next(saved.task.answers(saved.model, saved.tokenizer, (), [{"text": text}]))
    assert answer["generated"] == whole.decode(written[start:], skip_special_tokens=True)


def test_only_the_training_split_is_looked_at(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "bert", "classification", word_piece())
    whole = Pretrained(name=str(place)).tokenizer()
    only = {t for text in ROWS["test"] for t in ids(whole, text)} - {t for x in ROWS["train"] for t in ids(whole, x)}
    long = only - tokens.alphabet(whole) - tokens.always(whole)
    assert long
    train = set(read(recipe_of("classification", place, files)).tokens)
    every = set(
        read(recipe_of("classification", place, files, "compression.vocabulary.splits=[train,validation,test]")).tokens
    )
    assert not long & train
    assert long <= every
    assert train < every


def test_the_training_split_is_the_same_tokens(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "bert", "classification", word_piece())
    corpus = read(recipe_of("classification", place, files))
    assert corpus.whole is not None
    assert corpus.as_loaded is corpus.whole
    for row, before in zip(corpus.features["train"], corpus.whole.features["train"], strict=True):
        assert [corpus.tokens[token] for token in row["input_ids"]] == before["input_ids"]


def test_the_least_count_and_a_text_of_ones_own(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "bert", "classification", word_piece())
    whole = Pretrained(name=str(place)).tokenizer()
    counts: dict[int, int] = {}
    for text in ROWS["train"] * 2:
        for token in ids(whole, text):
            counts[token] = counts.get(token, 0) + 1
    long = {t for t in counts if len(whole.convert_ids_to_tokens(t).removeprefix("##")) > 1}
    least = "compression.vocabulary.min_count=4"
    kept = set(read(recipe_of("classification", place, files, least)).tokens)
    assert {t for t in long if t in kept} == {t for t in long if counts[t] >= 4} != long
    (tmp_path / "own.txt").write_text(OTHERS[1] + "\n")
    own = set(
        read(
            recipe_of("classification", place, files, least, f"compression.vocabulary.extra={tmp_path}/own.txt")
        ).tokens
    )
    assert own == kept | set(ids(whole, OTHERS[1])) != kept


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_teacher_of_the_whole_vocabulary(task: str, files: list[str], tmp_path: Path) -> None:
    """It reads the student's tokens under the numbers that they have there; its logits are those of the kept ones."""
    family = {"classification": "bert", "causal_lm": "llama"}[task]
    tokenizer = {"bert": word_piece, "llama": byte_pairs}[family]()
    place = folder(tmp_path / "hf", family, task, tokenizer)
    plain = recipe_of(task, place, files, "seed=5", "compression=[]")
    run(plain, tmp_path / "teacher", {})
    taught = ["compression=[prune/vocabulary,distill/logits]", f"compression.logits.teacher={tmp_path}/teacher"]
    recipe = recipe_of(task, place, files, *taught, "trainer.max_epochs=1")
    corpus = read(recipe)
    model = recipe.model.load(recipe.task, corpus.labels, recipe.seed)
    work = assemble(recipe, corpus, model)
    whole = artifact.load(tmp_path / "teacher" / "model").model
    batch = next(iter(corpus.evaluation("validation")))
    kept = torch.tensor(corpus.tokens)
    with torch.no_grad():
        said = whole(**{**recipe.task.inputs(batch), "input_ids": kept[batch["input_ids"]]})
        if task == "causal_lm":
            said.logits = said.logits[..., kept]
        outputs = model.eval()(**recipe.task.inputs(batch))
        teacher, student = (recipe.task.predictions(one, batch) for one in (said, outputs))
        term = float(work.terms["distill/logits"](outputs, batch))
    assert term == pytest.approx(float(softened_divergence(student, teacher, 2.0)), rel=1e-4, abs=1e-7)
    assert run(recipe, tmp_path / "student", {})["parity"] == 0


def test_a_teacher_of_the_cut_vocabulary_and_one_of_another(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "bert", "classification", word_piece())
    run(recipe_of("classification", place, files), tmp_path / "teacher", {})
    taught = ["compression=[prune/vocabulary,distill/logits]", f"compression.logits.teacher={tmp_path}/teacher"]
    recipe = recipe_of("classification", place, files, *taught, "trainer.max_epochs=1")
    corpus = read(recipe)
    context = context_of(recipe, corpus, recipe.model.load(recipe.task, corpus.labels, 0))
    teacher = context.load_teacher(str(tmp_path / "teacher"), "field")
    assert teacher.model.config.vocab_size == len(corpus.tokens)
    other = recipe_of(
        "classification", place, files, *taught, "compression.vocabulary.min_count=3", "trainer.max_epochs=1"
    )
    with pytest.raises(ConfigError, match="its vocabulary"):
        run(other, tmp_path / "other", {})


def test_another_run_starts_from_the_cut_model(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "bert", "classification", word_piece())
    run(recipe_of("classification", place, files), tmp_path / "first", {})
    again = recipe_of("classification", tmp_path / "first", files, "compression=[]")
    assert run(again, tmp_path / "second", {})["parity"] == 0
    first, second = (artifact.load(tmp_path / name / "model") for name in ("first", "second"))
    assert second.edits == ()
    assert torch.equal(*(logits(one.model, one.tokenizer, TEXTS[0]) for one in (first, second)))


def test_the_numbers_of_special_tokens_follow(files: list[str], tmp_path: Path) -> None:
    """Tokens in the middle of a vocabulary: the end token of a language model is its last."""
    tokenizer = byte_pairs()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    place = folder(tmp_path / "hf", "llama", "causal_lm", tokenizer)
    run(recipe_of("causal_lm", place, files), tmp_path, {})
    saved = artifact.load(tmp_path / "model")
    last = len(saved.tokenizer) - 1
    assert saved.tokenizer.eos_token_id == last == saved.model.config.eos_token_id
    assert saved.model.generation_config.eos_token_id == last
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == last
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == last + 1
    assert saved.model.get_input_embeddings().padding_idx == saved.tokenizer.pad_token_id


def test_hugging_face_reads_the_folder(files: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = folder(tmp_path / "hf", "bert", "classification", word_piece())
    run(recipe_of("classification", place, files), tmp_path, {})
    saved, theirs = artifact.load(tmp_path / "model"), tmp_path / "model"
    model = AutoModelForSequenceClassification.from_pretrained(theirs).eval()
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    found = logits(model, tokenizer, TEXTS[0])
    assert torch.allclose(found, logits(saved.model, saved.tokenizer, TEXTS[0]), atol=1e-6)


def test_the_map_is_written_in_runs() -> None:
    numbers = [0, 1, 2, 5, 8, 9, 100]
    assert KeepTokens.of(numbers).tokens == "0-2,5,8-9,100"
    assert KeepTokens(tokens="0-2,5,8-9,100").numbers == numbers


def test_positions_that_count_from_the_padding_token() -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=1
    )
    model = RobertaModel(config)
    refuse_shifted_positions(model, [0, 1, 2, 9])
    with pytest.raises(ConfigError, match=r"^compression\.vocabulary: the positions of this model count from"):
        refuse_shifted_positions(model, [1, 2, 9])
    assert named_by(config) == {0, 1, 2}


def test_the_empty_model_loses_the_tokens_too(files: list[str], tmp_path: Path) -> None:
    """Positions that would be shifted, and factors that are no smaller than what is left of the table, are refused
    before any weight is loaded."""
    place = folder(tmp_path / "hf", "roberta", "classification", word_piece())
    fewer = "compression.vocabulary.alphabet=false"
    recipe = recipe_of("classification", place, files, "compression=[prune/vocabulary]", fewer)
    corpus = read(recipe)
    student = pipeline.check_on_empty_model(recipe, corpus.labels, corpus.tokens)
    assert student.embeddings.weight.is_meta
    assert student.embeddings.num_embeddings == student.model.config.vocab_size == len(corpus.tokens)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"^compression\.vocabulary: the positions of this model count from"):
        pipeline.check_on_empty_model(recipe, corpus.labels, corpus.tokens[1:])
    most = len(corpus.tokens) * 32 // (len(corpus.tokens) + 32)
    both = ("compression=[prune/vocabulary,factorize/embeddings]", f"compression.factorize_embeddings.rank={most + 1}")
    recipe = recipe_of("classification", place, files, fewer, *both)
    with pytest.raises(ConfigError, match=rf"table of {len(corpus.tokens)} x 32; needs at most {most}"):
        pipeline.check_on_empty_model(recipe, corpus.labels, corpus.tokens)
    pipeline.check_on_empty_model(recipe, corpus.labels)  # in the whole table there is room for it


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"splits": []}, "splits"), ({"splits": ["training"]}, "splits"), ({"splits": ["train", "train"]}, "splits"),
        ({"min_count": 0}, "min_count"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^compression\.vocabulary\.{name}="):
        Vocabulary(**fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["compression.vocabulary.extra=nowhere.txt"], "extra='nowhere.txt': needs a text file in UTF-8"),
        (["compression.vocabulary.alphabet=false"], "alphabet=false: the tokenizer has no token for what it cannot"),
    ],
)
def test_refusals_that_the_tokenizer_tells(
    settings: list[str], message: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder(tmp_path / "hf", "modernbert", "classification", byte_pairs())
    monkeypatch.setattr(Pretrained, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=rf"^compression\.vocabulary\.{message}"):
        run(recipe_of("classification", place, files, *settings), tmp_path, {})


def test_a_vocabulary_that_is_used_up(files: list[str], tmp_path: Path) -> None:
    place = folder(tmp_path / "hf", "bert", "classification", word_piece(size=20))
    with pytest.raises(ConfigError, match=r"^compression\.vocabulary: the data uses all \d+ tokens of the model"):
        read(recipe_of("classification", place, files))
