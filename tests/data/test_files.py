"""Local files: each format read, each mistake named with its file and line."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from niwaki.data.files import Files
from niwaki.data.source import Needs
from niwaki.errors import ConfigError, DataError

CLASSIFY = Needs(required=("text", "label"), optional=("text_pair",))
TAG = Needs(required=("tokens", "tags"))
TEXT = Needs(required=("text",))
ROWS = [
    {"text": 'good, "very" good', "label": "1"},
    {"text": "two\nlines", "label": "0"},
    {"text": "é", "label": "1"},
]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(path: str, needs: Needs = CLASSIFY, **options) -> list[dict]:
    splits = Files(train=path, validation=path, test=path, **options).splits(needs, 0)
    assert [split[:] for split in splits.values()] == [splits["train"][:]] * 3
    return list(splits["train"])


def error(path: str, needs: Needs = CLASSIFY, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, needs, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(path, "FILE")


def test_csv(tmp_path: Path) -> None:
    content = 'text,label\r\n"good, ""very"" good",1\r\n"two\nlines",0\r\n\r\né,1\r\n'
    assert read(write(tmp_path / "a.csv", content)) == ROWS


def test_csv_with_a_byte_order_mark_and_a_long_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufefftext,label\n" + "x" * 200_000 + ",1\n")
    assert len(read(path)[0]["text"]) == 200_000


def test_csv_names_the_line_with_another_column_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"a\nb",1\nc,1,2\n')
    assert error(path) == "data.train=FILE line 4: 3 columns, but the header has 2"


def test_csv_names_the_line_where_a_multiline_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"a\nb",1\n"c\nd",\n')
    assert error(path) == "data.train=FILE line 4: column 'label' is empty"


def test_csv_counts_the_header_as_line_1(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\n,1\n")
    assert error(path) == "data.train=FILE line 2: column 'text' is empty"


def test_csv_with_an_open_quote_or_a_column_twice(tmp_path: Path) -> None:
    assert "line 3: unexpected end" in error(write(tmp_path / "a.csv", 'text,label\n"a,1\nb,2\n'))
    assert "column 'text' is named twice" in error(write(tmp_path / "b.csv", "text,text\na,b\n"))


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"so he said\t1\n')
    assert read(path) == [{"text": '"so he said', "label": "1"}]


def test_jsonl(tmp_path: Path) -> None:
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert read(write(tmp_path / "a.jsonl", content + "\n\n")) == ROWS
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(content.encode()))) == ROWS
    assert read(write(tmp_path / "data", content), format="jsonl") == ROWS


def test_jsonl_keeps_unusual_line_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85c", "label": true}\r\n')
    assert read(path) == [{"text": "a\u2028b\x85c", "label": "True"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad}", "line 3: not JSON: Expecting property name enclosed in double quotes at character 2"),
        ("[1]", 'line 3: is a list, must be an object such as {"text": "..."}'),
        ('{"text": "", "label": "a"}', "line 3: column 'text' is empty"),
        ('{"label": "a"}', "line 3: column 'text' is empty"),
        ('{"text": "b"}', "line 3: column 'label' is empty"),
        ('{"text": 5, "label": "a"}', "line 3: column 'text' is int 5, but str in the rows before"),
    ],
)
def test_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "label": "a"}\n\n' + line + "\n")
    assert error(path) == f"data.train=FILE {message}"


def test_columns_that_no_task_reads_may_hold_anything(tmp_path: Path) -> None:
    lines = [{"text": "x", "label": "a", "extra": 1}, {"text": "y", "label": "b", "extra": [{"z": "w"}]}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert [row["text"] for row in read(path)] == ["x", "y"]


def test_a_missing_column_names_file_columns_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"sentence": "x", "label": "a"}\n')
    message = "data.train=FILE: no column 'text'; found sentence, label; name it with data.columns.text=sentence"
    assert error(path) == message
    assert read(path, columns={"text": "sentence"}) == [{"text": "x", "label": "a"}]


def test_json_list(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", json.dumps(ROWS, indent=1))) == ROWS
    assert read(write(tmp_path / "b.json", "\n".join(map(json.dumps, ROWS)))) == ROWS
    assert error(write(tmp_path / "c.json", '[{"text": "x", "label": "a"}, 7]')).startswith(
        "data.train=FILE row 2: is a int"
    )
    assert "line 2: not JSON" in error(write(tmp_path / "d.json", '[\n{"text"}]'))


def test_parquet(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    table = pa.table({"text": ["x", "y"], "label": pa.array(["a", "b"]).dictionary_encode()})
    parquet.write_table(table, path)
    assert read(path) == [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]


def test_parquet_keeps_class_names(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"text": ["x"], "label": [1]}, features=features).to_parquet(path)
    assert read(path) == [{"text": "x", "label": "good"}]


def test_parquet_errors(tmp_path: Path) -> None:
    assert "not a readable Parquet file" in error(write(tmp_path / "a.parquet", "not parquet"))
    path = str(tmp_path / "b.parquet")
    parquet.write_table(pa.table({"text": ["x", None], "label": [1, 2]}), path)
    assert error(path) == "data.train=FILE row 2: column 'text' is empty"


def test_conll_columns_become_iob2(tmp_path: Path) -> None:
    content = (
        "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nand CC O O\nUN NNP I-NP I-ORG\nTom NNP I-NP B-PER\n"
        "Hanks NNP I-NP I-PER\n\n\nPeter NNP I-NP I-PER\nUN NNP I-NP I-ORG\nWHO NNP I-NP B-ORG\n"
    )
    assert read(write(tmp_path / "a.conll", content), TAG) == [
        {"tokens": ["EU", "and", "UN", "Tom", "Hanks"], "tags": ["B-ORG", "O", "B-ORG", "B-PER", "I-PER"]},
        {"tokens": ["Peter", "UN", "WHO"], "tags": ["B-PER", "B-ORG", "B-ORG"]},
    ]


def test_conll_with_tabs_at_the_end_of_the_file(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "a\tO\r\n\r\nb\tB-X"), TAG, format="conll") == [
        {"tokens": ["a"], "tags": ["O"]},
        {"tokens": ["b"], "tags": ["B-X"]},
    ]


def test_conll_names_the_line_with_another_column_count(tmp_path: Path) -> None:
    assert error(write(tmp_path / "a.conll", "a O\n\nb X O\n"), TAG) == "data.train=FILE line 3: 3 columns, must be 2"
    assert error(write(tmp_path / "b.conll", "a\n"), TAG) == "data.train=FILE line 1: 1 columns, must be 2 to 4"


def test_txt_rows_joined_are_the_file(tmp_path: Path) -> None:
    content = "one\r\n\n  two\n\n\nthree\u2028four\x0bfive\n\nlast"
    path = write(tmp_path / "a.txt", content)
    splits = Files(train=path, validation=path).splits(TEXT, 3)
    assert "".join(splits["validation"]["text"]) == content
    assert "".join(splits["train"]["text"]) + "".join(splits["test"]["text"]) == content
    assert splits["test"].num_rows == 1


def test_wrong_encoding_names_the_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text,label\ncaf\xe9,1\n")
    expected = "data.train=FILE: not UTF-8: byte 0xe9 at position 14 (line 2); save the file as UTF-8"
    assert error(path) == expected
    assert "byte 0xe9 at position 17" in error(write(tmp_path / "b.csv", b"\xef\xbb\xbftext,label\ncaf\xe9,1\n"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.conll", "a.txt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    assert error(write(tmp_path / name, "")) == "data.train=FILE: has no rows"


def test_a_header_alone_is_refused(tmp_path: Path) -> None:
    assert error(write(tmp_path / "a.csv", "text,label\n")) == "data.train=FILE: has no rows"


def test_missing_files_folders_and_broken_archives(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    assert error(str(tmp_path / "none.csv")) == "data.train=FILE: no such file"
    assert error(str(tmp_path / "none.parquet")) == "data.train=FILE: no such file"
    assert error(str(tmp_path / "folder.csv")) == "data.train=FILE: is a folder; name a file"
    assert "cannot be read" in error(write(tmp_path / "a.csv.gz", "plain"))
    assert "cannot be read" in error(write(tmp_path / "b.csv.gz", gzip.compress(b"text,label\na,b\n" * 99)[:-20]))


def test_errors_name_the_split_and_file_among_several(tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", "text,label\na,1\nb,2\n")
    bad = write(tmp_path / "bad.csv", "label,text\n1,c\n2,\n")
    with pytest.raises(DataError, match=r"data\.train=.*bad\.csv line 3: column 'text' is empty"):
        Files(train=[good, bad], validation=good, test=good).splits(CLASSIFY, 0)
    with pytest.raises(DataError, match=r"data\.test=.*bad\.csv line 3"):
        Files(train=good, validation=good, test=bad).splits(CLASSIFY, 0)
    other = write(tmp_path / "other.csv", "text\na\n")
    with pytest.raises(DataError, match=r"other\.csv: has columns text, but .*good\.csv has text, label"):
        Files(train=[good, other], validation=good, test=good).splits(CLASSIFY, 0)


def test_several_training_files_are_joined(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.csv", "text,label\na,1\n"),
        write(tmp_path / "b.jsonl", '{"label": "2", "text": "b"}\n'),
    ]
    splits = Files(train=paths, validation=paths[0], test=paths[0]).splits(CLASSIFY, 0)
    assert splits["train"][:] == {"text": ["a", "b"], "label": ["1", "2"]}


def test_relative_paths_start_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.csv", "text,label\na,1\n")
    monkeypatch.chdir(tmp_path)
    assert read("a.csv") == [{"text": "a", "label": "1"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "a.csv", "format": "xml"}, r"data\.format='xml': must be null or one of csv, tsv"),
        ({"train": "a.doc"}, r"data\.train=a\.doc: unknown ending; set data\.format to one of csv"),
        ({"train": "a.parquet.gz"}, "unknown ending"),
        ({"train": "a.csv", "test": "noending"}, r"data\.test=noending: unknown ending"),
        ({"train": []}, r"data\.train=\[\]: must be a path or a list"),
        ({"train": 5}, r"data\.train=5"),
        ({"train": "a.csv", "validation": ""}, r"data\.validation='': must be a path"),
        ({"train": ["a.csv", "b.txt"]}, "txt files cannot be mixed"),
    ],
)
def test_wrong_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Files(**options)


ANSWER = Needs(required=("context", "question", "answers"), optional=("id",))
CHAT = Needs(required=("messages",))
TRANSLATE = Needs(required=("source", "target"))


@pytest.mark.parametrize(
    ("given", "tags"),
    [
        ("B-A E-A O S-B S-B", "B-A I-A O B-B B-B"),  # BIOES
        ("B-A I-A E-A B-A E-A", "B-A I-A I-A B-A I-A"),
        ("B-A L-A U-A U-A O", "B-A I-A B-A B-A O"),  # BILOU
        ("B-A M-A E-A S-A", "B-A I-A I-A B-A"),  # BMES
        ("I-A I-A B-A I-B O I-B", "B-A I-A B-A B-B O B-B"),  # IOB1
        ("B-A I-A O B-A", "B-A I-A O B-A"),  # IOB2
        ("E-A I-A", "B-A B-A"),
        ("NN -LRB- NP-SBJ PRP$", "NN -LRB- NP-SBJ PRP$"),  # parts of speech
    ],
)
def test_conll_tags_of_every_scheme_become_iob2(tmp_path: Path, given: str, tags: str) -> None:
    words = given.split()
    for columns in ("{} {}", "{} NN {}", "{} NN B-NP {}"):
        path = write(tmp_path / "a.conll", "".join(columns.format(f"w{i}", tag) + "\n" for i, tag in enumerate(words)))
        (row,) = read(path, TAG)
        assert row == {"tokens": [f"w{i}" for i in range(len(words))], "tags": tags.split()}


def test_a_class_that_training_never_saw_is_named_by_file_and_line(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    other = write(tmp_path / "test.jsonl", '{"text": "c", "label": "x"}\n\n{"text": "d", "label": "z"}\n')
    with pytest.raises(
        DataError, match=r"^data\.test=.*test\.jsonl line 3 \('d'\): label 'z' never occurs in the 2 classes of"
    ):
        Files(train=train, validation=train, test=other, limit=1).splits(CLASSIFY, 0)


def test_an_unknown_tag_is_named_by_file_and_line(tmp_path: Path) -> None:
    train = write(tmp_path / "train.conll", "Ada B-PER\nis O\n\nOslo B-LOC\n")
    other = write(tmp_path / "test.conll", "Ada B-PER\n\nNATO B-MISC\n")
    with pytest.raises(DataError, match=r"^data\.test=.*test\.conll line \d+ .*: tags 'B-MISC' never occurs"):
        Files(train=train, validation=train, test=other).splits(Needs(required=("tokens", "tags")), 0)


@pytest.mark.parametrize("tag", ["X-PER", "b-PER", "B-"])
def test_conll_names_the_line_of_a_tag_that_is_none(tmp_path: Path, tag: str) -> None:
    path = write(tmp_path / "a.conll", f"a O\n\nb O\nc {tag}\n")
    expected = f"data.train=FILE line 4: tag '{tag}' begins with {tag[0]}-, must be O, or one of B-, I- (IOB), E-, S-"
    assert error(path, TAG).startswith(expected)
    assert error(write(tmp_path / "b.conll", "a B O C D\n"), TAG) == "data.train=FILE line 1: 5 columns, must be 2 to 4"


def squad(*asked: dict, context: str = "Ada was born in London.") -> dict:
    return {"version": "v2.0", "data": [{"title": "Ada", "paragraphs": [{"context": context, "qas": list(asked)}]}]}


WHERE = {"question": "Where?", "id": "q1", "answers": [{"text": "London", "answer_start": 16}]}
WHY = {
    "question": "Why?",
    "id": "q2",
    "answers": [],
    "is_impossible": True,
    "plausible_answers": [{"text": "x", "answer_start": 0}],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_is_known_by_its_content(tmp_path: Path, indent: int | None) -> None:
    content = json.dumps(squad(WHERE, WHY), indent=indent)
    expected = [
        {
            "context": "Ada was born in London.",
            "question": "Where?",
            "answers": {"text": ["London"], "answer_start": [16]},
            "id": "q1",
        },
        {
            "context": "Ada was born in London.",
            "question": "Why?",
            "answers": {"text": [], "answer_start": []},
            "id": "q2",
        },
    ]
    assert read(write(tmp_path / "a.json", content), ANSWER) == expected
    assert read(write(tmp_path / "a.json.gz", gzip.compress(content.encode())), ANSWER) == expected
    assert read(write(tmp_path / "data", content), ANSWER, format="squad") == expected


def test_squad_without_answers_can_be_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(squad({"question": "Where?"})))
    assert read(path, ANSWER.asking) == [{"context": "Ada was born in London.", "question": "Where?"}]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({**WHERE, "answers": [{"text": "London", "answer_start": 15}]}, "question 2: answer 'London' is not at 15,"),
        (
            {**WHERE, "answers": [{"text": "London.", "answer_start": 17}]},
            "question 2: answer 'London.' would end at c",
        ),
        ({**WHERE, "answers": [{"text": "London"}]}, "question 2 answer 1: has no 'answer_start'; the file must be {"),
        ({**WHERE, "answers": [{"text": 1, "answer_start": 0}]}, "question 2 answer 1: text is int 1, must be text"),
        ({**WHERE, "answers": None}, "question 2: answers is None, must be a list such as"),
        ({**WHERE, "is_impossible": True}, "question 2: is_impossible is true, but it has answers; leave one out"),
        ({"id": "q", "answers": []}, "question 2: has no 'question'; the file must be"),
        ({**WHERE, "question": " "}, "question 2: column 'question' is empty"),
        ("Where?", "question 2: is 'Where?', must be an object with 'question'"),
    ],
)
def test_squad_names_the_question(tmp_path: Path, asked: dict, message: str) -> None:
    path = write(tmp_path / "a.json", json.dumps(squad(WHERE, asked)))
    assert error(path, ANSWER).startswith(f"data.train=FILE {message}")


def test_squad_of_another_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([{"context": "a"}]))
    assert error(path, ANSWER, format="squad").startswith('data.train=FILE: is no SQuAD file, must be {"data": [{"par')
    path = write(tmp_path / "b.json", json.dumps({"data": [{"paragraphs": [{"qas": []}]}]}))
    assert error(path, ANSWER).startswith("data.train=FILE article 1 paragraph 1: has no 'context'; the file must be")
    assert "line 2: not JSON" in error(write(tmp_path / "c.json", '{"data":\n['), ANSWER)
    assert "line 2: not JSON" in error(write(tmp_path / "c.json", '{"data":\n['), ANSWER, format="squad")


SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARED = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": SAID, "label": True}, SAID),
        (SHARED, SAID),
        ({**SHARED, "system": "be kind"}, [{"role": "system", "content": "be kind"}, *SAID]),
        ({"instruction": "hi", "input": "", "output": "hello"}, SAID),
        ({"instruction": "hi", "output": "hello"}, SAID),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [
            {"role": "user", "content": "add\n1 2"}, {"role": "assistant", "content": "3"},
        ]),
        ({"instruction": "hi", "input": "", "output": "hello", "history": [["a", "b"]], "system": "s"}, [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"}, *SAID,
        ]),
    ],
)  # fmt: skip
def test_conversations_of_each_form(tmp_path: Path, row: dict, messages: list) -> None:
    for content in (json.dumps([row, row], indent=1), json.dumps(row) + "\n\n" + json.dumps(row) + "\n"):
        assert read(write(tmp_path / "a.json", content), CHAT, format="chat") == [{"messages": messages}] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": "b"},
            "has text, label; a conversation has messages, conversations, or instruction and o",
        ),
        ({"messages": "hi"}, "messages is str 'hi', must be a list of turns"),
        ({"messages": [{"role": "user"}]}, "turn 1 is {'role': 'user'}, must be an object with 'content'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "turn 1 has content ['a'], must be text"),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            "turn 1 is from 'tool', must be from one of system, human",
        ),
        ({"instruction": 5, "output": "x"}, "the row has instruction 5, must be text"),
        (
            {"instruction": "a", "output": "x", "history": [["a"]]},
            "history 1 is ['a'], must be a list of what was asked",
        ),
        ({"messages": SAID[:1]}, "column 'messages' has no turn of the role 'assistant', must have one to learn from"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "column 'messages' turn 1 has the role 'bot', must have one of",
        ),
        ({"instruction": "a", "output": ""}, "column 'messages' turn 2 has a content that is empty"),
    ],
)
def test_a_conversation_that_is_none_is_named(tmp_path: Path, row: dict, message: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(SHARED) + "\n" + json.dumps(row))
    assert error(path, CHAT, format="chat").startswith(f"data.train=FILE line 2: {message}")
    path = write(tmp_path / "a.json", json.dumps([SHARED, row]))
    assert error(path, CHAT, format="chat").startswith(f"data.train=FILE row 2: {message}")


def test_parallel_files_are_read_line_by_line(tmp_path: Path) -> None:
    pair = [write(tmp_path / "a.en", "one\r\n\n two \nthree"), write(tmp_path / "a.de", "eins\n\n zwei\u2028\ndrei\n")]
    splits = Files(train=pair, validation=pair, test=pair, format="parallel").splits(TRANSLATE, 0)
    assert splits["test"][:] == {"source": ["one", " two ", "three"], "target": ["eins", " zwei\u2028", "drei"]}
    packed = [write(tmp_path / f"b.{name}.gz", gzip.compress(b"a\n")) for name in ("en", "de")]
    splits = Files(train=packed, validation=packed, test=packed, format="parallel").splits(TRANSLATE, 0)
    assert splits["train"][:] == {"source": ["a"], "target": ["a"]}


def test_parallel_files_of_unequal_length_or_with_gaps(tmp_path: Path) -> None:
    long, short = write(tmp_path / "a.en", "one\ntwo\nthree\n"), write(tmp_path / "a.de", "eins\n\n")
    with pytest.raises(
        DataError, match=r"^data\.train=.*a\.en,.*a\.de: a\.en has 3 lines but a\.de has 2; line by line"
    ):
        Files(train=[long, short], format="parallel").splits(TRANSLATE, 0)
    long = write(tmp_path / "a.en", "one\ntwo\n")
    with pytest.raises(DataError, match=r"^data\.train=.*a\.en,.*a\.de line 2: column 'target' is empty$"):
        Files(train=[long, short], validation=[long, short], test=[long, short], format="parallel").splits(TRANSLATE, 0)
    with pytest.raises(DataError, match=r"^data\.train=.*none\.de: no such file$"):
        Files(train=[long, str(tmp_path / "none.de")], format="parallel").splits(TRANSLATE, 0)


@pytest.mark.parametrize("value", ["a.en", ["a.en"], ["a.en", "a.de", "a.fr"]])
def test_parallel_needs_two_files(value: object) -> None:
    with pytest.raises(ConfigError, match=r"must be a list of two files, such as \[train\.en,train\.de\]"):
        Files(train=value, format="parallel")
    with pytest.raises(ConfigError, match=r"data\.test=.*must be a list of two files"):
        Files(train=["a.en", "a.de"], test=value, format="parallel")


def test_the_first_row_of_another_type_is_named(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["a", "b"], "label": 0} for _ in range(40)]
    rows[17]["choices"] = ["a", 2]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    needs = Needs(required=("question", "choices", "label"))
    assert error(path, needs) == (
        "data.train=FILE line 18: column 'choices' holds ['a', 2], whose types do not form one column with the rows "
        "before"
    )


def test_half_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n{"text": "x \\ud800", "label": "b"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl line 2: column 'text' holds 'x .*ud800', half of a character"):
        Files(train=str(path)).splits(Needs(required=("text", "label")), 0)
