"""What every source owes a task: checked rows, three splits, samples that are pure functions of the seed."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from niwaki.data.columns import check_index, check_number, check_zero_or_one
from niwaki.data.source import Needs, Source
from niwaki.errors import ConfigError, DataError

CLASSIFY = Needs(required=("text", "label"), optional=("text_pair",))
TAG = Needs(required=("tokens", "tags"))
ANSWER = Needs(required=("context", "question", "answers"), optional=("id",))
CHOOSE = Needs(required=("question", "choices", "label"), checks={"label": check_index})
RATE = Needs(required=("text", "label"), checks={"label": check_number})
CHAT = Needs(required=("history", "response"))


@dataclass(frozen=True, kw_only=True)
class Given(Source):
    """Rows handed over as they are."""

    rows: dict[str, Dataset] = field(default_factory=dict)
    running: bool = False

    def read(self, needs: Needs) -> dict[str, Dataset]:
        return self.rows

    def is_running_text(self, split: str) -> bool:
        return self.running


def labelled(count: int, classes: int = 3, start: int = 0) -> Dataset:
    numbers = range(start, start + count)
    return Dataset.from_dict({"text": [f"text {i}" for i in numbers], "label": [f"c{i % classes}" for i in numbers]})


def whole(**columns: list) -> dict[str, Dataset]:
    return {split: Dataset.from_dict(columns) for split in ("train", "validation", "test")}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("eval_batch_size", "8"),
        ("limit", 0),
        ("shots", -1),
        ("shots", True),
        ("workers", -1),
        ("validation_fraction", 1.0),
        ("test_fraction", 0),
        ("columns", "text"),
        ("columns", {"text": ""}),
    ],
)
def test_a_wrong_setting_names_field_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}={value!r}".replace("{", r"\{").replace("}", r"\}")):
        Given(**{name: value})


def test_fractions_must_leave_rows_to_train_on() -> None:
    with pytest.raises(ConfigError, match="together"):
        Given(validation_fraction=0.5, test_fraction=0.5)


def test_splits_hold_the_columns_of_the_task_only() -> None:
    rows = whole(id=[1], text=["a"], label=[2], comment=["x"])
    splits = Given(rows=rows).splits(CLASSIFY, 0)
    assert list(splits) == ["train", "validation", "test"]
    assert all(split.column_names == ["text", "label"] for split in splits.values())
    assert splits["test"][0] == {"text": "a", "label": "2"}


def test_an_optional_column_is_taken_where_it_is() -> None:
    splits = Given(rows=whole(text=["a"], text_pair=["b"], label=["x"])).splits(CLASSIFY, 0)
    assert splits["train"][0] == {"text": "a", "label": "x", "text_pair": "b"}


def test_an_optional_column_of_one_split_only_is_refused() -> None:
    rows = whole(text=["a"], label=["x"]) | {
        "train": Dataset.from_dict({"text": ["a"], "text_pair": ["b"], "label": ["x"]})
    }
    with pytest.raises(DataError, match="split 'validation': no column 'text_pair'"):
        Given(rows=rows).splits(CLASSIFY, 0)


def test_columns_are_renamed_even_onto_a_name_that_is_taken() -> None:
    source = Given(rows=whole(sentence=["a"], text=["other"], label=["x"]), columns={"text": "sentence"})
    assert source.splits(CLASSIFY, 0)["train"][0]["text"] == "a"


def test_a_missing_column_names_those_found_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no column 'text'; found texts, label; .*data\.columns\.text=texts"):
        Given(rows=whole(texts=["a"], label=["x"])).splits(CLASSIFY, 0)


def test_a_mapping_that_the_task_does_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.question=q: .* reads text, label, text_pair"):
        Given(rows=whole(text=["a"], label=["x"]), columns={"question": "q"}).splits(CLASSIFY, 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", ""], "label": ["x", "y"]}, "split 'train' row 2: column 'text' is empty"),
        ({"text": ["a", " \n"], "label": ["x", "y"]}, "row 2: column 'text' is empty"),
        ({"text": ["a", None], "label": ["x", "y"]}, "row 2: column 'text' is empty"),
        ({"text": [1, 2], "label": ["x", "y"]}, "row 1: column 'text' is int 1, must be text"),
        ({"text": ["a", "b"], "label": ["x", None]}, "row 2: column 'label' is empty"),
        ({"text": ["a", "b"], "label": [1.0, float("nan")]}, "row 2: column 'label' is empty"),
        ({"text": ["a", "b"], "label": [["x"], ["y"]]}, "row 1: column 'label' is list"),
    ],
)
def test_a_bad_value_names_row_and_column(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Given(rows=whole(**columns)).splits(CLASSIFY, 0)


@pytest.mark.parametrize(
    ("tokens", "tags", "message"),
    [
        ([["a"], []], [["O"], []], "row 2: column 'tokens' is empty"),
        ([["a"], ["b", "c"]], [["O"], ["O"]], "row 2: 2 tokens but 1 tags"),
        ([["a"], ["b", " "]], [["O"], ["O", "O"]], "row 2: column 'tokens' has an empty word at 2"),
        ([["a"]], [[None]], "row 1: column 'tags' has NoneType None as word 1"),
        (["a"], [["O"]], "row 1: column 'tokens' is str 'a', must be a list"),
    ],
)
def test_bad_words_name_row_and_column(tokens: list, tags: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Given(rows=whole(tokens=tokens, tags=tags)).splits(TAG, 0)


@pytest.mark.parametrize(("label", "text"), [(3, "3"), (True, "True"), ("x", "x"), (0.5, "0.5")])
def test_labels_become_text(label: object, text: str) -> None:
    splits = Given(rows=whole(text=["a"], label=[label])).splits(CLASSIFY, 0)
    assert splits["train"]["label"][:] == [text]


def test_class_labels_become_their_names() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    splits = Given(rows=dict.fromkeys(("train", "validation", "test"), rows)).splits(CLASSIFY, 0)
    assert splits["test"]["label"][:] == ["good", "bad"]


def test_class_labels_in_lists_become_their_names() -> None:
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-X"]))})
    rows = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features=features)
    splits = Given(rows=dict.fromkeys(("train", "validation", "test"), rows)).splits(TAG, 0)
    assert splits["test"]["tags"][:] == [["B-X", "O"]]


def test_a_class_label_kept_back_is_named() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    with pytest.raises(DataError, match="row 1: column 'label' is empty"):
        Given(rows={"train": rows}).splits(CLASSIFY, 0)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="split 'test': has no rows"):
        Given(rows={"train": labelled(9), "test": labelled(0)}).splits(CLASSIFY, 0)


def test_carving_needs_enough_rows() -> None:
    with pytest.raises(DataError, match="3 rows are too few"):
        Given(rows={"train": labelled(3)}).splits(CLASSIFY, 0)


def test_carved_splits_are_disjoint_whole_and_seeded() -> None:
    source = Given(rows={"train": labelled(200)}, validation_fraction=0.2, test_fraction=0.1)
    splits = source.splits(CLASSIFY, 0)
    sizes = {name: split.num_rows for name, split in splits.items()}
    assert sizes == {"train": 140, "validation": 40, "test": 20}
    texts = [text for split in splits.values() for text in split["text"]]
    assert sorted(texts) == sorted(labelled(200)["text"])
    assert source.splits(CLASSIFY, 0)["test"]["text"][:] == splits["test"]["text"][:]
    assert source.splits(CLASSIFY, 1)["test"]["text"][:] != splits["test"]["text"][:]


def test_rows_are_carved_in_the_shares_of_their_classes() -> None:
    counts = Counter(Given(rows={"train": labelled(300)}).splits(CLASSIFY, 0)["test"]["label"])
    assert set(counts) == {"c0", "c1", "c2"}
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_equal_text_are_carved_together(seed: int) -> None:
    texts = [("Same  %d" if i % 2 else "same %d") % (i // 4) for i in range(200)]
    rows = {"train": Dataset.from_dict({"text": texts, "label": ["x"] * 200})}
    splits = Given(rows=rows).splits(CLASSIFY, seed)
    held = [{" ".join(text.lower().split()) for text in split["text"]} for split in splits.values()]
    assert not held[0] & held[1]
    assert not held[0] & held[2]
    assert not held[1] & held[2]
    assert sum(split.num_rows for split in splits.values()) == 200
    assert 12 <= splits["test"].num_rows <= 28


@pytest.mark.parametrize("seed", range(5))
def test_carving_leaves_each_label_in_train(seed: int) -> None:
    labels = ["common"] * 50 + [f"rare{i}" for i in range(30)]
    rows = {"train": Dataset.from_dict({"text": [f"t{i}" for i in range(80)], "label": labels})}
    splits = Given(rows=rows).splits(CLASSIFY, seed)
    assert set(splits["train"]["label"]) == set(labels)


def test_given_splits_are_left_alone_when_another_is_carved() -> None:
    rows = {"train": labelled(50), "test": labelled(7, start=100)}
    splits = Given(rows=rows).splits(CLASSIFY, 0)
    assert splits["test"]["text"][:] == rows["test"]["text"][:]
    assert (splits["train"].num_rows, splits["validation"].num_rows) == (45, 5)


def test_shots_are_that_many_of_each_class() -> None:
    rows = {split: labelled(60) for split in ("train", "validation", "test")}
    splits = Given(rows=rows, shots=4).splits(CLASSIFY, 0)
    assert Counter(splits["train"]["label"]) == {"c0": 4, "c1": 4, "c2": 4}
    assert splits["test"].num_rows == 60
    order = [int(text.split()[1]) for text in splits["train"]["text"]]
    assert order == sorted(order)
    assert Given(rows=rows, shots=4).splits(CLASSIFY, 1)["train"]["text"][:] != splits["train"]["text"][:]


def test_shots_of_several_labels_a_row_are_of_each() -> None:
    labels = [["a", "b"], ["a"], ["a"], ["a"], [], ["b"], ["b"], ["c"], ["c"]]
    rows = whole(text=[f"text {i}" for i in range(9)], labels=labels)
    needs = Needs(required=("text", "labels"))
    found = Given(rows=rows, shots=2).splits(needs, 0)["train"]["labels"][:]
    assert all(sum(label in given for given in found) >= 2 for label in "abc")
    assert len(found) <= 6
    with pytest.raises(DataError, match=r"data\.shots=3: class 'c' has only 2"):
        Given(rows=rows, shots=3).splits(needs, 0)


def test_rows_with_an_empty_text_are_left_out_where_that_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = whole(text=["a", " ", "c", ""], label=["x", "x", "y", "y"])
    with pytest.raises(DataError, match="is empty"):
        Given(rows=rows).splits(CLASSIFY, 0)
    found = Given(rows=rows, skip_empty=True).splits(CLASSIFY, 0)
    assert [part["text"][:] for part in found.values()] == [["a", "c"]] * 3
    assert found["test"]["label"][:] == ["x", "y"]
    assert "left out 2 of 4 rows, in which a text is empty" in capsys.readouterr().err
    with pytest.raises(DataError, match="has no row without an empty text"):
        Given(rows=whole(text=["", ""], label=["x", "y"]), skip_empty=True).splits(CLASSIFY, 0)


def test_shots_name_the_class_that_has_too_few() -> None:
    rows = whole(text=["a", "b", "c"], label=["x", "x", "y"])
    with pytest.raises(DataError, match=r"data\.shots=2: class 'y' has only 1"):
        Given(rows=rows, shots=2).splits(CLASSIFY, 0)


def test_shots_of_rows_without_classes_are_rows() -> None:
    rows = whole(tokens=[["a"], ["b"], ["c"]], tags=[["O"], ["B-X"], ["O"]])
    splits = Given(rows=rows, shots=2).splits(TAG, 0)
    assert [split.num_rows for split in splits.values()] == [2, 3, 3]
    assert Given(rows=rows, shots=9).splits(TAG, 0)["train"].num_rows == 3
    choices = {"question": ["a", "b", "c"], "choices": [["x", "y"]] * 3, "label": [0, 1, 1]}
    needs = Needs(required=("question", "choices", "label"), checks={"label": check_index})
    assert Given(rows=whole(**choices), shots=2).splits(needs, 0)["train"].num_rows == 2


def test_limit_samples_every_split_in_order_with_each_label_in_train() -> None:
    rows = {split: labelled(90, classes=9) for split in ("train", "validation", "test")}
    splits = Given(rows=rows, limit=10).splits(CLASSIFY, 0)
    assert [split.num_rows for split in splits.values()] == [10, 10, 10]
    assert len(set(splits["train"]["label"])) == 9
    order = [int(text.split()[1]) for text in splits["test"]["text"]]
    assert order == sorted(order)
    assert order != list(range(10))
    assert Given(rows=rows, limit=1000).splits(CLASSIFY, 0)["train"].num_rows == 90


def test_running_text_is_cut_in_order_and_keeps_blank_lines() -> None:
    lines = [f"line {i}\n" if i % 3 else "\n" for i in range(20)]
    needs = Needs(required=("text",))
    source = Given(rows={"train": Dataset.from_dict({"text": lines})}, running=True)
    splits = source.splits(needs, 0)
    assert [line for split in splits.values() for line in split["text"]] == lines
    assert splits["test"].num_rows == splits["validation"].num_rows == 2
    limited = Given(rows=source.rows, running=True, limit=2).splits(needs, 0)
    assert limited["train"]["text"][:] == lines[:2]


@pytest.mark.parametrize(
    ("needs", "columns", "message"),
    [
        (RATE, {"text": ["a", "b"], "label": [1.0, float("inf")]}, "row 2: column 'label' is float inf, must be a"),
        (CHOOSE, {"question": ["q"], "choices": [["a", "b"]], "label": ["E"]}, "row 1: label 4 is none of the 2 choic"),
        (
            ANSWER,
            {"context": ["a b"], "question": ["q"], "answers": [{"text": ["b"], "answer_start": [0]}]},
            "row 1: answer 'b' is not at 0, where 'a' stands; it stands at 2",
        ),
    ],
)
def test_a_task_checks_its_columns_and_pairs_of_them(needs: Needs, columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"^split 'train' {message}"):
        Given(rows=whole(**columns)).splits(needs, 0)


def test_the_columns_that_a_model_is_given() -> None:
    assert ANSWER.asked == ("context", "question", "id")
    assert ANSWER.asking.required == ("context", "question")
    assert ANSWER.asking.optional == ("id",)
    assert CLASSIFY.asked == ("text", "text_pair")
    assert CHOOSE.asked == ("question", "choices")
    assert Needs(required=("tokens", "tags"), asks=("text",)).asked == ("text",)
    assert Needs(required=("history", "candidate", "label")).asked == ("history", "candidate")
    code = Needs(required=("prompt", "solution", "tests", "entry_point"), optional=("id",))
    assert code.asking.required == ("prompt",)
    assert code.asking.optional == ("id",)
    assert replace(code, hints=("tests",)).asking.optional == ("id", "tests")
    assert Needs(required=("source", "target"), optional=("references",)).asked == ("source",)


def test_what_a_model_was_trained_on_is_required_where_it_reads_it() -> None:
    assert CLASSIFY.trained_on(()) == CLASSIFY
    assert CLASSIFY.trained_on(("text", "label")).all == ("text", "label")
    assert CLASSIFY.trained_on(("text", "label", "text_pair")).required == ("text", "label", "text_pair")
    assert ANSWER.trained_on(("context", "question", "answers", "id")).optional == ("id",)
    write = Needs(required=("source", "target"), optional=("references",))
    assert write.trained_on(("source", "target", "references")) == write
    assert CHOOSE.trained_on(CHOOSE.required).checks == CHOOSE.checks


def apart(splits: dict[str, Dataset], key) -> bool:
    """Whether no two splits share what `key` makes of their rows."""
    held = [{key(row) for row in split} for split in splits.values()]
    return not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


@pytest.mark.parametrize("seed", range(3))
def test_questions_on_one_context_are_carved_together(seed: int) -> None:
    rows = [
        {"context": f"text {i // 5}", "question": f"q {i}", "answers": {"text": [], "answer_start": []}, "id": i}
        for i in range(200)
    ]
    splits = Given(rows={"train": Dataset.from_list(rows)}).splits(ANSWER, seed)
    assert apart(splits, lambda row: row["context"])
    assert all(10 <= splits[split].num_rows <= 30 for split in ("validation", "test"))


@pytest.mark.parametrize("seed", range(3))
def test_the_turns_of_one_conversation_are_carved_together(seed: int) -> None:
    rows = []
    for talk in range(40):
        turns = ["Hello", *(f"turn {i} of {talk}" for i in range(6))]
        rows += [{"history": turns[:i], "response": turns[i], "talk": talk} for i in (2, 3, 4, 6)]
    splits = Given(rows={"train": Dataset.from_list(rows)}).splits(CHAT, seed)
    assert apart(splits, lambda row: row["history"][1].split()[-1])
    assert sum(split.num_rows for split in splits.values()) == 160
    assert all(8 <= splits[split].num_rows <= 28 for split in ("validation", "test"))


def test_conversations_of_equal_questions_are_carved_together() -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Q {i // 4}"}, {"role": "assistant", "content": f"answer {i}"}]}
        for i in range(120)
    ]
    splits = Given(rows={"train": Dataset.from_list(rows)}).splits(Needs(required=("messages",)), 0)
    assert apart(splits, lambda row: row["messages"][0]["content"])
    assert splits["train"][0]["messages"] == rows[0]["messages"]


def test_numbers_on_a_scale_are_no_classes() -> None:
    rows = Dataset.from_dict({"text": [f"t {i}" for i in range(60)], "label": [i / 7 for i in range(60)]})
    splits = Given(rows={"train": rows}).splits(RATE, 0)
    assert [split.num_rows for split in splits.values()] == [48, 6, 6]
    assert all(isinstance(label, float) for label in splits["test"]["label"][:])
    assert (
        Given(rows=dict.fromkeys(("train", "validation", "test"), rows), shots=2).splits(RATE, 0)["train"].num_rows == 2
    )
    assert Given(rows={"train": rows}, limit=5).splits(RATE, 0)["train"].num_rows == 5


def test_rows_with_several_labels_leave_each_in_train() -> None:
    labels = [["common"] if i % 3 else [] for i in range(90)]
    labels[7], labels[8] = ["common", "rare"], ["rarest"]
    rows = {"train": Dataset.from_dict({"text": [f"t {i}" for i in range(90)], "labels": labels})}
    needs = Needs(required=("text", "labels"))
    for seed in range(5):
        splits = Given(rows=rows).splits(needs, seed)
        assert {label for row in splits["train"]["labels"] for label in row} == {"common", "rare", "rarest"}
        assert splits["test"].num_rows == 9
    limited = Given(rows=rows, limit=4, validation_fraction=0.2).splits(needs, 0)["train"]
    assert {label for row in limited["labels"] for label in row} == {"common", "rare", "rarest"}


def test_histories_that_go_on_share_a_split() -> None:
    """What came next in one row stands in the history of another; rows that say what did not come next stay beside."""
    rows: dict[str, list] = {"history": [], "candidate": [], "label": []}
    for user in range(20):
        titles = [f"{user} {i}" for i in range(7)]
        for count in range(1, 7):
            for label, title in ((1, titles[count]), (0, f"no {user} {count}")):
                rows["history"].append(titles[:count])
                rows["candidate"].append(title)
                rows["label"].append(label)
    needs = Needs(required=("history", "candidate", "label"), checks={"label": check_zero_or_one})
    splits = Given(rows={"train": Dataset.from_dict(rows)}).splits(needs, 0)
    users = {name: {history[0].split()[0] for history in split["history"][:]} for name, split in splits.items()}
    assert users["test"]
    assert not users["train"] & users["test"]
    assert not users["train"] & users["validation"]
