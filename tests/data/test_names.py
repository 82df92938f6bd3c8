"""What a column of the task may be made of."""

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from niwaki.data import names
from niwaki.data.columns import check_index
from niwaki.data.names import origin_of, roots
from niwaki.data.source import Needs, Source
from niwaki.errors import ConfigError, DataError

ROW = {
    "translation": {"en": "tree", "de": "Baum"},
    "choices": {"text": ["oak", "koi"], "label": ["A", "B"]},
    "turns": [{"who": "x", "said": "hi"}, {"who": "y", "said": "ho"}],
    "answer": "B",
    "a": "one",
    "b": "two",
    "lines": ["l1", "l2"],
    "a.b": "dotted",
    "f(a)": "called so",
    "{a}": "braced",
    "none": None,
    "marked": "x; y z ;;",
    "commas": "x,y",
}


@pytest.mark.parametrize(
    ("spec", "value", "reads"),
    [
        ("a", "one", ("a",)),
        ("translation.de", "Baum", ("translation",)),
        ("choices.text", ["oak", "koi"], ("choices",)),
        ("turns.said", ["hi", "ho"], ("turns",)),
        (["a", "b"], ["one", "two"], ("a", "b")),
        (["b", "translation.en"], ["two", "tree"], ("b", "translation")),
        ("{a}, {b} and {a}", "one, two and one", ("a", "b")),
        ("{lines}\n{translation.de}", "l1\nl2\nBaum", ("lines", "translation")),
        ("{a}{none}", "one", ("a", "none")),
        ("{none}", None, ("none",)),
        ("none.x", None, ("none",)),
        ("position(answer, choices.label)", 1, ("answer", "choices")),
        ("split(marked, ;)", ["x", "y z"], ("marked",)),
        ("split(commas)", ["x", "y"], ("commas",)),
        ("split(commas, ,)", ["x", "y"], ("commas",)),
        ("split(translation.de, |)", ["Baum"], ("translation",)),
        ("split(none, ;)", [], ("none",)),
        ("a.b", "dotted", ("a.b",)),
        ("f(a)", "called so", ("f(a)",)),
        ("{a}", "braced", ("{a}",)),
        ("absent.x", None, ("absent.x",)),
        ("unknown(a)", None, ("unknown(a)",)),
    ],
)
def test_a_spec_names_what_it_reads_and_makes_the_value(spec: Any, value: Any, reads: tuple[str, ...]) -> None:
    origin = origin_of(spec, ROW)
    assert origin.reads == reads
    assert set(reads) <= roots(spec)
    if set(reads) <= set(ROW):
        assert origin.of(ROW) == value


def test_answers_are_moved_to_where_they_stand() -> None:
    context = "a pine, a pine and an oak"
    given = {"text": ["pine", "pine", "fir", "oak"], "answer_start": [9, 3, 0, -1]}
    assert names.placed(given, context) == {"text": ["pine", "pine", "oak"], "answer_start": [10, 2, 22]}
    assert names.placed({"text": [], "answer_start": []}, context) == {"text": [], "answer_start": []}
    with pytest.raises(ValueError, match=r"^has no answer that occurs in the context: 'fir'$"):
        names.placed({"text": ["fir"], "answer_start": [0]}, context)


def test_the_function_that_tests_call() -> None:
    code = (
        "import math\n\ndef add(a, b):\n    return a + b\n\ndef total(xs):\n    return add(*xs)\n\ndef show(): pass\n"
    )
    assert names.called(code, ["assert total([1, 2]) == 3", "assert math.isclose(total([1, 1]), 2)"]) == "total"
    assert names.called(code, "assert add(1, 2) == 3") == "add"
    assert names.called(code, ["assert total([add(1, 2)]) == 3"]) == "total"
    assert names.called(code, ["assert subtotal(1)"]) is None
    with pytest.raises(ValueError, match="the code is no Python: "):
        names.called("def add(", ["add(1)"])


class Given(Source):
    rows: Dataset

    def read(self, needs: Needs) -> dict[str, Dataset]:
        return dict.fromkeys(("train", "validation", "test"), self.rows)


def given(rows: Dataset, **columns: Any) -> Source:
    source = Given(columns=columns)
    object.__setattr__(source, "rows", rows)
    return source


CHOOSE = Needs(required=("question", "choices", "label"), checks={"label": check_index})


def test_a_row_is_made_by_its_specs() -> None:
    rows = Dataset.from_list([{**ROW, "answer": answer} for answer in "AB"])
    source = given(rows, question="What is {a}?", choices="choices.text", label="position(answer, choices.label)")
    found = source.splits(CHOOSE, 0)["test"]
    assert found[1] == {"question": "What is one?", "choices": ["oak", "koi"], "label": 1}
    assert found["label"][:] == [0, 1]


@pytest.mark.parametrize(
    ("changed", "columns", "message"),
    [
        ({"answer": "E"}, {}, r"row 1: column 'position\(answer, choices.label\)' is 'E', must be one of A, B$"),
        ({"answer": ""}, {}, r"row 1: column 'position\(answer, choices.label\)' is empty$"),
        ({}, {"choices": "choices.txt"}, r"row 1: column 'choices.txt' has no 'txt', is an object with text, label$"),
        ({}, {"choices": ["a", "c"]}, r": no column 'c'; found translation, .*name it with data\.columns\.choices="),
        ({}, {"question": "{translation.fr}"}, r"row 1: column '\{translation.fr\}' has no 'fr', is an object with"),
        ({}, {"question": "split(lines, ;)"}, r"row 1: column 'split\(lines, ;\)' is a list .* already, must"),
        ({"b": ""}, {"choices": ["a", "b"]}, r"row 1: column '\[a, b\]' choice 2 is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_named(changed: dict, columns: dict, message: str) -> None:
    specs = {"question": "a", "choices": "choices.text", "label": "position(answer, choices.label)", **columns}
    with pytest.raises(DataError, match=message):
        given(Dataset.from_list([{**ROW, **changed}]), **specs).splits(CHOOSE, 0)


def test_the_class_of_a_choice_is_its_number() -> None:
    features = Features({name: Value("string") for name in "qab"} | {"label": ClassLabel(names=["choice1", "choice2"])})
    rows = Dataset.from_dict({"q": ["?", "?"], "a": ["x", "y"], "b": ["z", "w"], "label": [1, 0]}, features=features)
    found = given(rows, question="q", choices=["a", "b"]).splits(CHOOSE, 0)["train"]
    assert found["label"][:] == [1, 0]
    kept_back = Dataset.from_dict({"q": ["?"], "a": ["x"], "b": ["z"], "label": [-1]}, features=features)
    with pytest.raises(DataError, match="row 1: column 'label' is empty"):
        given(kept_back, question="q", choices=["a", "b"]).splits(CHOOSE, 0)


@pytest.mark.parametrize("spec", [[], ["a", ""], 5, ""])
def test_a_spec_is_text_or_a_list_of_texts(spec: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\.columns="):
        Given(columns={"text": spec})
