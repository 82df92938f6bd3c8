"""Augmented copies: how often words are replaced and by what, what stays, and the command that writes them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_models import masked_lm, save

from niwaki import cli, compose, entry
from niwaki.data.augment import Augmentation, Words
from niwaki.errors import ConfigError
from niwaki.model import proposals
from niwaki.model.proposals import Proposer
from niwaki.model.tiny import Tiny


@pytest.fixture
def proposer() -> Proposer:
    """One that finds x and then y likeliest, wherever it is asked."""
    tokenizer = Tiny().tokenizer()
    return Proposer(masked_lm(tokenizer, likeliest=["x", "y"]), tokenizer)


@pytest.mark.parametrize("text", ["The old pine, isn't it?  Yes!\n", "...", "", "a", " 7 x-y/z "])
def test_a_text_falls_into_parts_and_back(text: str) -> None:
    words = Words.of(text)
    assert words.text == text
    assert words.replaced([None] * len(words.places)) == text
    assert [text[a:b] for a, b in words.spans] == [words.parts[place] for place in words.places]


def test_words_and_their_replacements() -> None:
    words = Words.of("The old pine, isn't it?")
    assert [words.parts[place] for place in words.places] == ["The", "old", "pine", "isn't", "it"]
    assert words.replaced([None, "new", None, "was", None]) == "The new pine, was it?"
    listed = Words.of(["New York", ",", "pine"])
    assert (listed.text, listed.spans) == ("New York , pine", [(0, 8), (11, 15)])
    assert listed.replaced(["Oslo", None]) == ["Oslo", ",", "pine"]


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_words_are_replaced_in_their_share(share: float) -> None:
    settings, generator = Augmentation(share=share), np.random.default_rng(0)
    count, options = 20_000, ["x", "y", "z"]
    found = Counter(settings.draw(options, generator) for _ in range(count))
    # within four standard deviations of the binomial distribution
    assert abs(found[None] - (1 - share) * count) <= 4 * (share * (1 - share) * count) ** 0.5
    for option in options:
        chance = share / 3
        assert abs(found[option] - chance * count) <= 4 * (chance * (1 - chance) * count) ** 0.5
    assert settings.draw([], generator) is None


def test_copies_worked_by_hand(proposer: Proposer) -> None:
    """With one candidate and every word replaced there is one copy; words that stand there are no candidates."""
    rows: list[Any] = [{"text": "a pine.", "text_pair": "x"}, {"tokens": ["b", "!", "Y"]}]
    settings = Augmentation(copies=5, share=1.0, candidates=1)
    assert list(settings.augment(rows, proposer, 8)) == [
        {"text": "x x.", "text_pair": "y"},
        {"tokens": ["x", "!", "x"]},
    ]
    settings = Augmentation(copies=200, share=0.5, candidates=2)
    found = {row["text"] for row in settings.augment([{"text": "a x"}], proposer, 8)}
    third = proposer.propose([("a x", [(2, 3)])], 2, 8)[0][0][1]
    assert found == {f"{a} {b}" for a in "axy" for b in ("x", "y", third)} - {"a x"}


def test_no_copy_equals_a_row_or_another_copy(proposer: Proposer) -> None:
    rows: list[Any] = [{"text": "a b c"}, {"text": "a b c"}, {"text": "x b c"}]
    found = [row["text"] for row in Augmentation(copies=50, candidates=1).augment(rows, proposer, 8)]
    assert len(found) == len(set(found))
    assert not set(found) & {"a b c", "x b c"}
    assert set(found) == {f"{a} {b} {c}" for a in "axy" for b in "bx" for c in "cx"} - {"a b c", "x b c"}


def test_the_share_of_words_in_copies(proposer: Proposer) -> None:
    rows: list[Any] = [{"tokens": [*"abcdefghij", str(i)]} for i in range(30)]
    copies = list(Augmentation(copies=20).augment(rows, proposer, 64))
    assert len(copies) > 590
    changed = [copy["tokens"][place] != "abcdefghij"[place] for copy in copies for place in range(10)]
    assert np.mean(changed) == pytest.approx(0.4, abs=0.03)


def test_the_draws_of_a_row_depend_on_seed_and_number_alone(
    proposer: Proposer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [{"text": f"a b c d {i}"} for i in range(10)]
    first = list(Augmentation().augment(rows, proposer, 8))
    assert first == list(Augmentation().augment(rows, proposer, 3))
    assert first != list(Augmentation(seed=1).augment(rows, proposer, 8))
    monkeypatch.setattr("niwaki.data.augment.ROWS_AT_ONCE", 3)
    assert first == list(Augmentation().augment(rows, proposer, 8))
    fewer = list(Augmentation().augment(rows[:5], proposer, 8))
    assert 80 < len(fewer) <= 100
    assert fewer == first[: len(fewer)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"copies": 0}, "--copies 0: needs a whole number of at least 1"),
        ({"candidates": -1}, "--candidates -1: needs a whole number of at least 1"),
        ({"share": 0.0}, "--share 0.0: needs a number above 0, up to 1"),
        ({"share": 1.1}, "--share 1.1: needs"),
        ({"share": float("nan")}, "--share nan: needs"),
        ({"seed": -1}, "--seed -1: needs"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(**fields)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def augment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`augment(*arguments)`: exit code, stdout, stderr of the command."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["niwaki", "augment", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("mlm") / "model", Tiny().tokenizer())


def test_the_command_writes_rows_without_labels(augment: Any, model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"s": f"a pine {i}", "label": i, "extra": "é"} for i in range(4)])
    out = tmp_path / "new.jsonl"
    common = ("--file", file, "--model", model, "--column", "text=s")
    assert augment(*common, "--out", out, "--copies", 3) == (0, f"{out}: {len(lines(out))} rows\n", "")
    assert 8 < len(lines(out)) <= 12
    assert all(set(row) == {"s"} for row in lines(out))
    again = tmp_path / "again.jsonl"
    augment(*common, "--output", again, "--copies", 3, "--batch-size", 1)
    assert again.read_bytes() == out.read_bytes()
    before = out.read_bytes()
    code, _, err = augment(*common, "--output", out, "--seed", 1)
    assert (code, err) == (2, f"error: --output {out}: exists already; choose another name, or add --overwrite\n")
    assert out.read_bytes() == before
    assert augment(*common, "--output", out, "--seed", 1, "--overwrite")[0] == 0
    assert out.read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "new.jsonl", "again.jsonl"}


def test_the_command_keeps_lists_of_words(augment: Any, model: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["ada", "met", ".", str(i)], "tags": ["B-PER", "O", "O", "O"]} for i in range(3)]
    out = tmp_path / "out.jsonl"
    assert augment("--file", write(tmp_path / "rows.jsonl", rows), "--model", model, "--output", out)[0] == 0
    assert all(list(row) == ["tokens"] and len(row["tokens"]) == 4 and row["tokens"][2] == "." for row in lines(out))


def test_the_command_refuses(augment: Any, model: str, tmp_path: Path) -> None:
    file, out = write(tmp_path / "rows.jsonl", [{"text": "a pine", "label": 1}]), tmp_path / "out.jsonl"
    (tmp_path / "empty.jsonl").touch()
    signs = write(tmp_path / "signs.jsonl", [{"text": "..."}])
    both = write(tmp_path / "both.jsonl", [{"text": "a", "tokens": ["a"]}])
    neither = write(tmp_path / "neither.jsonl", [{"sentence": "a"}])
    blank = write(tmp_path / "blank.jsonl", [{"text": "a"}, {"text": " "}])

    def refused(*arguments: Any, file: Path = file, out: Path = out, model: str = model) -> str:
        code, said, err = augment("--file", file, "--model", model, "--output", out, *arguments)
        assert (code, said) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip()

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert refused("--copies", 0) == "--copies 0: needs a whole number of at least 1"
    assert refused("--share", 0) == "--share 0.0: needs a number above 0, up to 1"
    assert refused("--device", "tpu") == "--device tpu: needs auto, cpu or cuda"
    assert refused("--column", "label=x") == "--column label=x: needs one of text, text_pair, tokens"
    assert refused("--column", "text=txt").startswith(
        f"--file {file}: no column 'txt'; found text, label; use --column"
    )
    assert refused(file=tmp_path / "none.jsonl") == f"--file {tmp_path / 'none.jsonl'}: no such file"
    assert refused(file=tmp_path / "empty.jsonl") == f"--file {tmp_path / 'empty.jsonl'}: has no rows"
    assert refused(file=signs) == f"--file {signs}: none of its words could be replaced"
    assert refused(file=both).startswith(f"--file {both}: has text and tokens; needs a column text")
    assert refused(file=neither).startswith(f"--file {neither}: has neither text nor tokens; needs")
    assert refused(file=blank) == f"--file {blank} line 2: column 'text' is empty"
    assert refused(file=tmp_path / "a.doc").startswith(f"--file {tmp_path / 'a.doc'}: unknown ending; needs one of csv")
    assert refused(out=tmp_path / "out.csv").endswith("needs a name that ends in .jsonl")
    assert refused(out=tmp_path / "no" / "out.jsonl").endswith(f"there is no folder {tmp_path / 'no'}")
    assert refused("--overwrite", out=file).endswith("is the file that is read; choose another name")
    assert refused(model="./none") == "--model './none': there is no such folder"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_is_left_of_one_that_is_stopped(
    augment: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"text": f"a pine {i}"} for i in range(600)])
    old = write(tmp_path / "old.jsonl", [{"text": "old"}])
    propose, asked = Proposer.propose, []

    def stop(self: Any, *arguments: Any) -> Any:
        asked.append(len(list(tmp_path.iterdir())))
        if len(asked) > 1:
            raise KeyboardInterrupt
        return propose(self, *arguments)

    monkeypatch.setattr(proposals.Proposer, "propose", stop)
    for out in (tmp_path / "new.jsonl", old):
        asked.clear()
        said = augment("--file", file, "--model", model, "--output", out, "--overwrite", "--copies", 1)
        assert said == (130, "", "interrupted; nothing was written\n")
        assert asked == [3, 3]
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "old.jsonl"}
    assert lines(old) == [{"text": "old"}]


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_built_in_rows_are_augmented_and_a_student_learns_from_them(
    augment: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    from niwaki.data.builtin.python_docs import PythonDocs

    monkeypatch.chdir(tmp_path)
    tiny = ["model=tiny-bert", "trainer=debug", "logger=none", "callbacks=[]", "measure=scores", "data.limit=24"]
    chosen = [*tiny, f"task={task}", "data.batch_size=4", "trainer.max_steps=8", "data.unlabelled=augmented.jsonl"]
    config = compose.compose(
        [*chosen, "compression=distill/logits", "compression.logits.teacher=auto", "compression.logits.cache=true"]
    ).config
    needs = compose.build(config).task.needs
    train = PythonDocs(limit=24).splits(needs, 0)["train"]
    write(tmp_path / "train.jsonl", list(train))
    assert augment("--file", "train.jsonl", "--model", model, "--out", "augmented.jsonl", "--copies", 2)[0] == 0
    count = len(lines(tmp_path / "augmented.jsonl"))
    assert 40 < count <= 48
    run = tmp_path / "run"
    run.mkdir()
    entry.run(config, run, False)
    assert json.loads((run / "metrics.json").read_text())["after"]["test"]
    (teacher,) = [path for path in (tmp_path / "logs" / "teachers").iterdir() if path.is_dir()]
    assert "unlabelled: null" in (teacher / "config.yaml").read_text()
