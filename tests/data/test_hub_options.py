"""The options for data sets of the hub, on folders with the columns that the hub has for them."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from niwaki import compose
from niwaki.data.columns import check_index, check_marked, check_number
from niwaki.data.hub import Hub
from niwaki.data.source import Needs, Source
from niwaki.errors import DataError

FOLDER = compose.config_folder() / "data" / "hub"
OPTIONS = sorted(path.stem for path in FOLDER.glob("*.yaml"))

CLASSIFY = Needs(required=("text", "label"), optional=("text_pair",))
RATE = Needs(required=("text", "label"), optional=("text_pair",), checks={"label": check_number})
TAG = Needs(required=("tokens", "tags"))
ANSWER = Needs(required=("context", "question", "answers"), optional=("id",))
WRITE = Needs(required=("source", "target"), optional=("references",))
CHOOSE = Needs(required=("question", "choices", "label"), checks={"label": check_index})
READ = Needs(required=("text",))
RELATE = Needs(required=("text", "label"), checks={"text": check_marked})
CODE = Needs(required=("prompt", "solution", "tests", "entry_point"), optional=("id",))

TEXT, NUMBER = Value("string"), Value("int32")
COUNT = 20  # rows of each split


def classes(*names: str) -> ClassLabel:
    return ClassLabel(names=list(names))


def named(*columns: str, label: Any = None) -> dict[str, Any]:
    """Features of text columns, and a label."""
    return {**dict.fromkeys(columns, TEXT), **({} if label is None else {"label": label}), "idx": NUMBER}


def texts(*columns: str, label: Any = 1) -> dict[str, Any]:
    return {**{column: f"{column} #" for column in columns}, "label": label, "idx": 0}


ENTAILS = classes("entailment", "not_entailment")
SQUAD = {
    "id": TEXT,
    "title": TEXT,
    "context": TEXT,
    "question": TEXT,
    "answers": {"text": List(TEXT), "answer_start": List(NUMBER)},
}
ASKED = {
    "id": "id #",
    "title": "a title",
    "context": "pots: a pine, #",
    "question": "question #?",
    "answers": {"text": ["a pine"], "answer_start": [6]},
}
SCIENCE = {"id": TEXT, "question": TEXT, "choices": {"text": List(TEXT), "label": List(TEXT)}, "answerKey": TEXT}
ASKED_SCIENCE = {
    "id": "id #",
    "question": "what # is?",
    "choices": {"text": ["a tree", "a fish", "a stone"], "label": ["A", "B", "C"]},
    "answerKey": "C",
}
FOUND_SCIENCE = {"question": "what 7 is?", "choices": ["a tree", "a fish", "a stone"], "label": 2}
SPOKEN = {"translation": {"de": TEXT, "en": TEXT}}
CODED = {"task_id": NUMBER, "text": TEXT, "code": TEXT, "test_list": List(TEXT), "test_setup_code": TEXT,
         "challenge_test_list": List(TEXT)}  # fmt: skip
USUAL = ("train", "validation", "test")

# option: the task's columns, the hub's features, a row there (# is its number), its splits there, and row 7 as the
# task has it
SETS: dict[str, tuple[Needs, dict, dict, tuple[str, ...], dict]] = {
    "cola": (
        CLASSIFY, named("sentence", label=classes("unacceptable", "acceptable")), texts("sentence"), USUAL,
        {"text": "sentence 7", "label": "acceptable"},
    ),
    "sst2": (
        CLASSIFY, named("sentence", label=classes("negative", "positive")), texts("sentence"), USUAL,
        {"text": "sentence 7", "label": "positive"},
    ),
    "mrpc": (
        CLASSIFY, named("sentence1", "sentence2", label=classes("not_equivalent", "equivalent")),
        texts("sentence1", "sentence2"), USUAL,
        {"text": "sentence1 7", "label": "equivalent", "text_pair": "sentence2 7"},
    ),
    "qqp": (
        CLASSIFY, named("question1", "question2", label=classes("not_duplicate", "duplicate")),
        texts("question1", "question2"), USUAL,
        {"text": "question1 7", "label": "duplicate", "text_pair": "question2 7"},
    ),
    "stsb": (
        RATE, named("sentence1", "sentence2", label=Value("float32")), texts("sentence1", "sentence2", label=2.5),
        USUAL,
        {"text": "sentence1 7", "label": 2.5, "text_pair": "sentence2 7"},
    ),
    "mnli": (
        CLASSIFY, named("premise", "hypothesis", label=classes("entailment", "neutral", "contradiction")),
        texts("premise", "hypothesis"),
        ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
        {"text": "premise 7", "label": "neutral", "text_pair": "hypothesis 7"},
    ),
    "qnli": (
        CLASSIFY, named("question", "sentence", label=ENTAILS), texts("question", "sentence"), USUAL,
        {"text": "question 7", "label": "not_entailment", "text_pair": "sentence 7"},
    ),
    "rte": (
        CLASSIFY, named("sentence1", "sentence2", label=ENTAILS), texts("sentence1", "sentence2"), USUAL,
        {"text": "sentence1 7", "label": "not_entailment", "text_pair": "sentence2 7"},
    ),
    "wnli": (
        CLASSIFY, named("sentence1", "sentence2", label=ENTAILS), texts("sentence1", "sentence2"), USUAL,
        {"text": "sentence1 7", "label": "not_entailment", "text_pair": "sentence2 7"},
    ),
    "tnews": (
        CLASSIFY, named("sentence", label=classes("100", "101")), texts("sentence"), USUAL,
        {"text": "sentence 7", "label": "101"},
    ),
    "afqmc": (
        CLASSIFY, named("sentence1", "sentence2", label=classes("0", "1")), texts("sentence1", "sentence2"), USUAL,
        {"text": "sentence1 7", "label": "1", "text_pair": "sentence2 7"},
    ),
    "ag_news": (
        CLASSIFY, named("text", label=classes("World", "Sports")), texts("text"), ("train", "test"),
        {"text": "text 7", "label": "Sports"},
    ),
    "banking77": (
        CLASSIFY, named("text", label=classes("activate_my_card", "age_limit")), texts("text"), ("train", "test"),
        {"text": "text 7", "label": "age_limit"},
    ),
    "conll2003": (
        TAG, {"id": TEXT, "tokens": List(TEXT), "pos_tags": List(NUMBER), "ner_tags": List(classes("O", "B-PER"))},
        {"id": "#", "tokens": ["Ada", "#"], "pos_tags": [1, 2], "ner_tags": [1, 0]}, USUAL,
        {"tokens": ["Ada", "7"], "tags": ["B-PER", "O"]},
    ),
    "squad": (
        ANSWER, SQUAD, ASKED, ("train", "validation"),
        {"context": "pots: a pine, 7", "question": "question 7?", "id": "id 7",
         "answers": {"text": ["a pine"], "answer_start": [6]}},
    ),
    "squad_v2": (
        ANSWER, SQUAD, {**ASKED, "answers": {"text": [], "answer_start": []}}, ("train", "validation"),
        {"context": "pots: a pine, 7", "question": "question 7?", "id": "id 7",
         "answers": {"text": [], "answer_start": []}},
    ),
    "cmrc2018": (
        ANSWER, SQUAD, {**ASKED, "answers": {"text": ["a pine", "an oak"], "answer_start": [5, 0]}}, USUAL,
        {"context": "pots: a pine, 7", "question": "question 7?", "id": "id 7",
         "answers": {"text": ["a pine"], "answer_start": [6]}},
    ),
    "xsum": (
        WRITE, {"document": TEXT, "summary": TEXT, "id": TEXT}, {"document": "long #", "summary": "short", "id": "#"},
        USUAL, {"source": "long 7", "target": "short"},
    ),
    "cnn_dailymail": (
        WRITE, {"article": TEXT, "highlights": TEXT, "id": TEXT},
        {"article": "long #", "highlights": "short", "id": "#"}, USUAL, {"source": "long 7", "target": "short"},
    ),
    "samsum": (
        WRITE, {"id": TEXT, "dialogue": TEXT, "summary": TEXT}, {"id": "#", "dialogue": "long #", "summary": "short"},
        USUAL, {"source": "long 7", "target": "short"},
    ),
    "wmt14_de_en": (
        WRITE, SPOKEN, {"translation": {"de": "Baum #", "en": "tree #"}}, USUAL,
        {"source": "Baum 7", "target": "tree 7"},
    ),
    "wmt16_de_en": (
        WRITE, SPOKEN, {"translation": {"de": "Baum #", "en": "tree #"}}, USUAL,
        {"source": "Baum 7", "target": "tree 7"},
    ),
    "commonsense_qa": (
        CHOOSE, {**SCIENCE, "question_concept": TEXT}, {**ASKED_SCIENCE, "question_concept": "x"}, USUAL, FOUND_SCIENCE,
    ),
    "arc_easy": (CHOOSE, SCIENCE, ASKED_SCIENCE, USUAL, FOUND_SCIENCE),
    "arc_challenge": (
        CHOOSE, SCIENCE,
        {**ASKED_SCIENCE, "choices": {"text": ["a tree", "a fish", "a stone"], "label": ["1", "2", "3"]},
         "answerKey": "3"}, USUAL, FOUND_SCIENCE,
    ),
    "copa": (
        CHOOSE, named("premise", "question", "choice1", "choice2", label=Value("int64")),
        {**texts("premise", "choice1", "choice2"), "question": "cause"}, ("train", "test"),
        {"question": "premise 7 What was the cause of this?", "choices": ["choice1 7", "choice2 7"], "label": 1},
    ),
    "piqa": (
        CHOOSE, named("goal", "sol1", "sol2", label=classes("0", "1")), texts("goal", "sol1", "sol2"), USUAL,
        {"question": "goal 7", "choices": ["sol1 7", "sol2 7"], "label": 1},
    ),
    "humaneval": (
        CODE, dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), TEXT),
        {"task_id": "HumanEval/#", "prompt": "def f#():", "canonical_solution": "    return 1",
         "test": "def check(f): assert f()", "entry_point": "f#"}, ("test",),
        {"prompt": "def f7():", "solution": "    return 1", "tests": "def check(f): assert f()", "entry_point": "f7",
         "id": "HumanEval/7"},
    ),
    "mbpp": (
        CODE, CODED,
        {"task_id": 7, "text": "Write function #.", "code": "import re\ndef f#(a):\n    return a",
         "test_list": ["assert f#(1) == 1", "assert f#(2) == 2"], "test_setup_code": "", "challenge_test_list": []},
        (*USUAL, "prompt"),
        {"prompt": "Write function 7.", "solution": "import re\ndef f7(a):\n    return a",
         "tests": "assert f7(1) == 1\nassert f7(2) == 2", "entry_point": "f7", "id": "7"},
    ),
    "iflytek": (
        CLASSIFY, named("sentence", label=classes("0", "1")), texts("sentence"), USUAL,
        {"text": "sentence 7", "label": "1"},
    ),
    "e2e_nlg": (
        WRITE, {"meaning_representation": TEXT, "human_reference": TEXT},
        {"meaning_representation": "name[#], food[cake]", "human_reference": "# has cake."}, USUAL,
        {"source": "name[7], food[cake]", "target": "7 has cake."},
    ),
    "wikitext2": (READ, {"text": TEXT}, {"text": "trees #"}, USUAL, {"text": "trees 7"}),
    "semeval2010_task8": (
        RELATE, {"sentence": TEXT, "relation": classes("Other", "Cause-Effect(e1,e2)")},
        {"sentence": "<e1>rain #</e1> made a <e2>pond</e2>", "relation": 1}, ("train", "test"),
        {"text": "<e1>rain 7</e1> made a <e2>pond</e2>", "label": "Cause-Effect(e1,e2)"},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def numbered(value: Any, number: int) -> Any:
    """A value with each # in it as a number."""
    if isinstance(value, dict):
        return {name: numbered(one, number) for name, one in value.items()}
    if isinstance(value, list):
        return [numbered(one, number) for one in value]
    return value.replace("#", str(number)) if isinstance(value, str) else value


def written(folder: Path, features: dict, row: dict, splits: tuple[str, ...]) -> str:
    """A folder as the hub has it: a Parquet file for each split, and a card that names them."""
    folder.mkdir()
    files = "".join(f"  - split: {split}\n    path: {split}-0.parquet\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    for split in splits:
        rows = [numbered(row, number) for number in range(COUNT)]
        Dataset.from_list(rows, features=Features(features)).to_parquet(str(folder / f"{split}-0.parquet"))
    return str(folder)


def option(name: str, path: str) -> Source:
    chosen = [f"data=hub/{name}", f"data.path='{path}'", "data.name=null", "data.revision=null"]
    chosen += ["task=code_generation"] if SETS[name][0] is CODE else []  # one of them is not learned from
    source = compose.build(compose.compose(chosen).config).data
    assert isinstance(source, Hub)
    return source


def test_every_option_has_a_case() -> None:
    assert sorted(SETS) == OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reads_its_set_by_the_columns_of_its_task(name: str, tmp_path: Path) -> None:
    needs, features, row, splits, expected = SETS[name]
    found = option(name, written(tmp_path / "set", features, row, splits)).splits(needs, 0)
    rows = [one for split in found.values() for one in split]
    assert expected in rows
    assert all(set(one) == set(expected) for one in rows)
    assert min(split.num_rows for split in found.values()) >= 1


@pytest.mark.parametrize("name", [name for name in OPTIONS if "test: carve" in (FOLDER / f"{name}.yaml").read_text()])
def test_where_labels_are_kept_back_the_test_rows_are_of_the_training_split(name: str, tmp_path: Path) -> None:
    needs, features, row, splits, _ = SETS[name]
    source = option(name, written(tmp_path / "set", features, row, splits))
    assert isinstance(source, Hub)
    assert set(source.read(needs)) <= {"train", "validation"}
    found = source.splits(needs, 0)
    assert found["train"].num_rows + found["test"].num_rows <= COUNT
    column = needs.required[0]
    assert not set(map(str, found["train"][column][:])) & set(map(str, found["test"][column][:]))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_names_a_set_that_needs_no_script(name: str) -> None:
    config = compose.compose([f"data=hub/{name}"]).config["data"]
    assert config["path"].count("/") == 1
    if config["revision"] is not None:  # there the one configuration has no name
        assert (config["revision"], config["name"]) == ("refs/convert/parquet", None)


def test_the_option_and_the_folder_of_one_name_are_told_apart() -> None:
    plain = compose.compose(["data=hub", "data.path=some/set"]).config["data"]
    assert (plain["path"], plain["columns"]) == ("some/set", {})
    named_one = compose.compose(["data=hub/mrpc", "data.limit=5", "data.columns.text=sentence2"]).config["data"]
    assert (named_one["path"], named_one["limit"]) == ("nyu-mll/glue", 5)
    assert named_one["columns"] == {"text": "sentence2", "text_pair": "sentence2"}


def test_an_answer_that_is_none_of_the_choices_is_named(tmp_path: Path) -> None:
    needs, features, row, splits, _ = SETS["arc_easy"]
    path = written(tmp_path / "set", features, {**row, "answerKey": "E"}, splits)
    with pytest.raises(DataError, match=r"split train row 1: column 'position\(.*\)' is 'E', must be one of A, B, C$"):
        option("arc_easy", path).splits(needs, 0)
