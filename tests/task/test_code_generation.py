"""pass@k by brute force; programs of both kinds of prompt; generated text with its spaces."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from written import batch_of, features, tiny

from niwaki import compose, inference, pipeline
from niwaki.errors import ConfigError
from niwaki.task import sandbox
from niwaki.task.code_generation import CodeGeneration, code_of, pass_at_k, program
from niwaki.task.layout import IN_LINE

HEAD = 'def double(x):\n    """Twice x."""\n'
ROWS: dict[str, list[Any]] = {
    "prompt": [HEAD, "Write a function that doubles."],
    "solution": ["    return 2 * x\n", "def double(x):\n    return x + x"],
    "tests": ["def check(candidate):\n    assert candidate(2) == 4\n", "assert double(3) == 6\nassert double(1) == 2"],
    "entry_point": ["double", "double"],
}


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_one_that_passes(samples: int) -> None:
    for right in range(samples + 1):
        passed = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            draws = [any(draw) for draw in combinations(passed, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(sum(draws) / len(draws))
    assert pass_at_k(10_000, 3, 5_000) == pytest.approx(0.875, abs=1e-3)  # factorials would not do


def test_programs_of_both_kinds() -> None:
    of_body, of_program = (
        program(*(ROWS[name][i] for name in ("prompt", "solution", "tests", "entry_point"))) for i in (0, 1)
    )
    assert of_body == (HEAD + "    return 2 * x\n", ROWS["tests"][0] + "\ncheck(double)\n")
    assert of_program == (ROWS["solution"][1], ROWS["tests"][1])
    assert all(one.passed for one in sandbox.run_all([of_body, of_program]))
    called = "def check(candidate):\n    assert candidate(2) == 4\ncheck(double)\n"
    assert program(HEAD, "", called, "double")[1] == called


def test_a_description_stands_as_a_docstring_with_its_first_test() -> None:
    task = CodeGeneration()
    assert task._sources(ROWS) == [HEAD, '"""\nWrite a function that doubles.\nassert double(3) == 6\n"""\n']
    assert task._sources({"prompt": ROWS["prompt"]})[1] == '"""\nWrite a function that doubles.\n"""\n'
    set_up = {"prompt": ["words"], "tests": ["import math\nassert f(1)\nassert f(2)\nassert f(3)"]}
    assert CodeGeneration(shown_tests=2)._sources(set_up) == ['"""\nwords\nassert f(1)\nassert f(2)\n"""\n']


def test_answers_end_where_the_benchmarks_end_them() -> None:
    task = CodeGeneration()
    assert task.ended(HEAD, "    return 1\n\ndef other():\n    pass") == "    return 1\n"
    assert task.ended("words", "import re\ndef f():\n    pass\nprint(f())") == "import re\ndef f():\n    pass"
    assert CodeGeneration(stop=["#"]).ended(HEAD, "a # b") == "a "


def test_spaces_of_the_first_line_stay() -> None:
    """Also with a decoder of tokens that leaves out the space before a text's first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", "<unk>", "\u2581", "\n", *"abcdefghijklmnopqrstuvwxyz():*2"]
    plain = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    source, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("def f(x):\n", "    return x")
    )
    answer = [3, 3, 3, 3, *tokenizer("return", add_special_tokens=False)["input_ids"][1:], 1]
    batch = IN_LINE.collate([{"input_ids": [0, *source]}], tokenizer)
    assert tokenizer.decode(answer, skip_special_tokens=True) == "   return"
    assert code_of(batch, torch.tensor([answer]), tokenizer) == ["    return"]


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_right_answers_pass_and_wrong_ones_do_not(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = CodeGeneration(max_length=120, max_target_length=40, samples=3, k=[1, 2], do_sample=True)
    model, tokenizer = tiny(family, task)
    scores: Any = task.scores((), tokenizer)
    drawn = iter(
        [["    return 2 * x", "x"], ["    return x", "x"], ["    return 2 * x\nprint(", "def double(x): return x * 2"]]
    )
    monkeypatch.setattr(scores, "read", lambda batch, written: next(drawn))
    task.score(scores, model, batch_of(task, tokenizer, ROWS))
    found = scores.compute()
    assert found["pass@1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores.report()["outcomes"] == {"passed": 3, "AssertionError": 1, "NameError": 2}
    assert scores.compute() == found


def test_long_prompts_keep_their_end() -> None:
    task = CodeGeneration(max_length=10)
    _, tokenizer = tiny("llama", task)
    tokens = tokenizer.convert_ids_to_tokens(features(task, tokenizer, ROWS)[0]["input_ids"])
    assert tokens[0] == "[CLS]"
    assert tokens[-3:] == ['"'] * 3
    assert len(tokens) == 10


def test_a_prompt_that_was_cut_fails_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is answered: the model did not see all of it. At the very length nothing is cut."""
    long = {**ROWS, "prompt": [HEAD, "Write a function that doubles whatever number it is given."]}
    _, tokenizer = tiny("llama", CodeGeneration(max_length=200, max_target_length=40))
    lengths = [len(row["input_ids"]) for row in features(CodeGeneration(max_length=200), tokenizer, long)]
    assert lengths[0] < lengths[1]
    for room, cut in ((lengths[1], 0), (lengths[1] - 1, 1), (lengths[0], 1), (lengths[0] - 1, 2)):
        task = CodeGeneration(max_length=room, max_target_length=40)
        model, tokenizer = tiny("llama", task)
        scores: Any = task.scores((), tokenizer)
        monkeypatch.setattr(scores, "read", lambda batch, written: ROWS["solution"])
        task.score(scores, model, batch_of(task, tokenizer, long))
        assert scores.compute()["pass@1"] == (2 - cut) / 2
        told = {"passed": 2 - cut, "the prompt is longer than task.max_length": cut}
        assert scores.report()["outcomes"] == {kind: count for kind, count in told.items() if count}


def test_the_lengths_hold_the_benchmarks_and_the_model_that_is_there_reads_them() -> None:
    from niwaki.model.anatomy import Anatomy

    recipe = compose.build(compose.compose(["task=code_generation"]).config)
    assert (recipe.task.max_length, recipe.task.max_target_length) == (1024, 512)
    recipe.task.check(Anatomy.of(recipe.model.empty(recipe.task, ())))
    small = compose.build(compose.compose(["task=code_generation", "model=tiny-gpt2"]).config)
    with pytest.raises(ConfigError, match=r"task.max_length=1024.*: the model reads at most 512 tokens"):
        small.task.check(Anatomy.of(small.model.empty(small.task, ())))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 2}, "task.samples=2: a search finds one text; needs task.do_sample=true"),
        ({"k": [1, 5]}, r"task.k=\[1, 5\]: needs 1, and numbers up to task.samples=1"),
        ({"k": []}, r"task.k=\[\]: needs 1"),
        ({"timeout": 0.0}, "task.timeout=0.0: needs a number above 0"),
        ({"memory": 1}, "task.memory=1: needs a number of at least 64"),
        ({"shown_tests": -1}, "task.shown_tests=-1: needs a whole number of at least 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodeGeneration(**settings)


def test_where_there_is_no_sandbox_the_task_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from niwaki.model.anatomy import Anatomy

    asked = []

    def none(limits: sandbox.Limits, *, isolated: bool) -> None:
        asked.append(limits)
        if isolated:
            raise sandbox.NoSandbox("task.unsafe=false: no")

    monkeypatch.setattr(sandbox, "check", none)
    model, _ = tiny("llama", CodeGeneration())
    with pytest.raises(ConfigError, match=r"task.unsafe=false"):
        CodeGeneration().check(Anatomy.of(model))
    CodeGeneration(unsafe=True, timeout=7.0, memory=100).check(Anatomy.of(model))
    assert asked == [sandbox.Limits(), sandbox.Limits(seconds=7.0, memory=100)]


def test_predict_writes_code() -> None:
    task = CodeGeneration(max_length=60, max_target_length=8)
    model, tokenizer = tiny("llama", task)
    found = list(task.answers(model, tokenizer, (), [{"prompt": HEAD}, {"prompt": "words"}]))
    assert [set(row) for row in found] == [{"prompt", "generated"}] * 2


def test_predict_shows_the_tests_that_a_row_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training; rows with and without them, and with names, in one batch."""
    task = CodeGeneration(max_length=60, max_target_length=8)
    model, tokenizer = tiny("llama", task)
    shown: list[str] = []
    plain = CodeGeneration._sources
    monkeypatch.setattr(
        CodeGeneration, "_sources", lambda self, rows: shown.extend(plain(self, rows)) or plain(self, rows)
    )
    asking = task.needs.asking
    assert (asking.required, asking.optional) == (("prompt",), ("id", "tests"))
    rows = [
        asking.from_text(text) for text in ('{"prompt": "words", "tests": "assert f(1)\\nassert f(2)"}', "words", HEAD)
    ] + [asking.from_text('{"prompt": "more", "id": 4}')]  # fmt: skip
    found = list(task.answers(model, tokenizer, (), rows))
    assert shown == ['"""\nwords\nassert f(1)\n"""\n', '"""\nwords\n"""\n', HEAD, '"""\nmore\n"""\n']
    assert [{name: row[name] for name in row if name != "generated"} for row in found] == rows
    saved: Any = SimpleNamespace(columns=task.needs.required, task=task)
    assert [inference.like_trained(row, saved) for row in rows] == rows  # none is asked for its tests
    with pytest.raises(ConfigError, match="'tests' is no column that may be named there; needs a text without braces"):
        CodeGeneration(prefix="{tests}")


def test_every_problem_of_humaneval_is_one_to_measure_with(tmp_path: Path) -> None:
    """And none is learned from."""
    (tmp_path / "set").mkdir()
    row = {"canonical_solution": ROWS["solution"][0], "test": ROWS["tests"][0], "entry_point": "double", "prompt": HEAD}
    lines = [json.dumps({"task_id": f"HumanEval/{number}", **row}) for number in range(8)]
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(lines))
    settings = [
        "task=code_generation", "data=hub/humaneval", f"data.path={tmp_path / 'set'}", "task.max_length=96",
        "task.max_target_length=4", "measure=scores", "logger=none", "callbacks=[]", "trainer.precision=fp32",
    ]  # fmt: skip
    recipe = compose.build(compose.compose(settings).config)
    assert not recipe.fits
    assert [len(split) for split in recipe.data.splits(recipe.task.needs, 0).values()] == [8, 8, 8]
    (tmp_path / "run").mkdir()
    found = pipeline.run(recipe, tmp_path / "run", {})
    assert found["steps"] == 0
    assert sum(found["outcomes"].values()) == 8
    with pytest.raises(ConfigError, match=r"data.train=test and data.validation=test: .*set data.shots=0"):
        compose.build(compose.compose([*settings, "data.shots=null"]).config)
