import pytest

from niwaki import artifact, inference
from niwaki.data.source import Needs
from niwaki.errors import DataError
from niwaki.task.multi_label import MultiLabel
from niwaki.task.ner import NER


class Echo:
    """A task that notes the size of each batch."""

    def __init__(self):
        self.sizes = []

    def answers(self, model, tokenizer, labels, rows):
        self.sizes.append(len(rows))
        yield from rows


class Saved:
    model = tokenizer = labels = None
    columns = ()

    def __init__(self):
        self.task = Echo()


def test_answers_come_before_the_next_batch_is_read():
    read = []

    def rows():
        for i in range(5):
            read.append(i)
            yield {"text": str(i)}

    saved = Saved()
    found = inference.answers(saved, rows(), 2)
    assert next(found) == {"text": "0"}
    assert read == [0, 1]
    assert [row["text"] for row in found] == ["1", "2", "3", "4"]
    assert saved.task.sizes == [2, 2, 1]


def test_only_a_task_of_pairs_gets_pairs(tmp_path):
    file = tmp_path / "pairs.tsv"
    file.write_text("text\ttext_pair\tid\na\tb\t1\n")
    pairs = Needs(required=("text", "label"), optional=("text_pair",))
    assert list(inference.file_rows(file, {}, pairs)) == [{"text": "a", "text_pair": "b"}]
    assert list(inference.file_rows(file, {}, Needs(required=("text",)))) == [{"text": "a"}]


def test_packed_lines_lose_their_line_breaks(tmp_path):
    import gzip

    file = tmp_path / "lines.txt.gz"
    file.write_bytes(gzip.compress(b"one\ntwo\r\n"))
    assert list(inference.file_rows(file, {}, Needs(required=("text",)))) == [
        {"text": "one"},
        {"text": "two"},
    ]


def test_a_whole_file_gives_every_row_in_order(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(30)))
    rows = inference.WholeFile(train=str(file)).rows(Needs(required=("text", "label")))
    assert rows["text"][:] == [f"t{i}" for i in range(30)]


def test_labels_inside_lists_are_checked_too(tmp_path):
    file = tmp_path / "tags.conll"
    file.write_text("ada B-PER\nmet O\n\nkyoto B-LOC\n")
    rows = inference.WholeFile(train=str(file)).rows(Needs(required=("tokens", "tags")))
    inference.check_labels(rows, ("B-LOC", "B-PER", "O"), "f", NER())
    with pytest.raises(
        DataError, match=r"f row 2: tags 'B-LOC' is none of the 2 that the artifact knows; the nearest is"
    ):
        inference.check_labels(rows, ("B-PER", "O"), "f", NER())
    inference.check_labels(rows, (), "f", NER())
    bioes = NER(scheme="bioes")
    inference.check_labels(
        rows, tuple(sorted({tag for row in rows["tags"][:] for tag in bioes.read_as("tags", row)})), "f", bioes
    )


PLAIN = Needs(required=("text", "label"), optional=("text_pair",)).asking
ANSWER = Needs(required=("context", "question", "answers"), optional=("id",))
CHOOSE = Needs(required=("question", "choices", "label"))


@pytest.mark.parametrize(
    ("needs", "line", "row"),
    [
        (PLAIN, "a pine", {"text": "a pine"}),
        (PLAIN, '{"text": "a", "text_pair": "b", "label": 1}', {"text": "a", "text_pair": "b"}),
        (PLAIN, '{"text": "a", "text_pair": null}', {"text": "a"}),
        (PLAIN, "{a} pine", {"text": "{a} pine"}),
        (PLAIN, '["a"]', {"text": '["a"]'}),
        (
            ANSWER.asking,
            '{"question": "q", "context": "c", "id": 3}\n',
            {"context": "c", "question": "q", "id": "3"},
        ),
        (CHOOSE.asking, '{"question": "q", "choices": ["a", "b"]}', {"question": "q", "choices": ["a", "b"]}),
        (Needs(required=("source", "target")).asking, "ein Baum", {"source": "ein Baum"}),
        (Needs(required=("history", "response")).asking, "hi", {"history": ["hi"]}),
        (Needs(required=("messages",)).asking, "hi", {"messages": [{"role": "user", "content": "hi"}]}),
        (Needs(required=("tokens", "tags"), asks=("text",)).asking, "ada met", {"text": "ada met"}),
    ],
)
def test_a_line_is_a_row_by_columns_or_the_one_text(needs, line, row):
    assert list(inference.text_rows([line], "stdin line", needs)) == [row]


@pytest.mark.parametrize(
    ("needs", "line", "message"),
    [
        (PLAIN, " ", "is empty"),
        (PLAIN, '{"txt": "a"}', """has no 'text'; give {"text": "..."}"""),
        (PLAIN, '{"text": 5}', "column 'text' is int 5, must be text"),
        (ANSWER.asking, "who?", """is no JSON object; give {"context": "...", "question": "..."}"""),
        (
            ANSWER.asking,
            '{"question": q}',
            """is no JSON object (Expecting value at character 14); give """
            """{"context": "...", "question": "..."}""",
        ),
        (
            CHOOSE.asking,
            '{"question": "q"}',
            """has no 'choices'; give {"question": "...", "choices": ["...", "..."]}""",
        ),
        (CHOOSE.asking, '{"question": "q", "choices": ["a"]}', "column 'choices' has the one choice 'a', must have tw"),
    ],
)
def test_a_line_that_fills_no_row_is_named(needs, line, message):
    with pytest.raises(DataError) as caught:
        list(inference.text_rows([line], "argument", needs))
    assert str(caught.value).startswith(f"argument 1: {message}")


def test_files_of_every_task_are_read_by_the_columns_that_it_asks(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"context": "c d", "question": "q", "answers": {"text": ["x"], "answer_start": [0]}}\n')
    assert list(inference.file_rows(file, {}, ANSWER)) == [{"context": "c d", "question": "q"}]
    file.write_text('{"context": "c", "query": "q"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl: no column 'question'; found context, query"):
        list(inference.file_rows(file, {}, ANSWER))
    assert list(inference.file_rows(file, {"question": "query"}, ANSWER)) == [{"context": "c", "question": "q"}]
    text = tmp_path / "rows.txt"
    text.write_text("who?\n")
    with pytest.raises(DataError, match=r"rows\.txt line 1: is no JSON object; give \{"):
        list(inference.file_rows(text, {}, ANSWER))


def test_several_labels_of_a_row_are_checked(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "labels": []}\n{"text": "b", "labels": ["joy", "awee"]}\n')
    rows = inference.WholeFile(train=str(file)).rows(Needs(required=("text", "labels")))
    inference.check_labels(rows, ("awee", "joy"), "f", MultiLabel())
    with pytest.raises(DataError, match=r"f row 2: labels 'awee' is none of the 2 .*; the nearest is 'awe'"):
        inference.check_labels(rows, ("awe", "joy"), "f", MultiLabel())


def test_what_a_row_is_called_is_no_part_of_what_was_trained_on():
    saved = Saved()
    saved.task.needs = Needs(required=("context", "question", "answers"), optional=("id", "title"))
    row = {"context": "c", "question": "q"}
    for columns in (("context", "question", "answers", "id"), ("context", "question", "answers")):
        saved.columns = columns
        assert inference.like_trained(row, saved) == row
        assert inference.like_trained({**row, "id": "7", "title": "t"}, saved) == {**row, "id": "7"}
    saved.columns = ("context", "question", "answers", "title")
    with pytest.raises(DataError, match=r"^context 'c': has no title, .*a file with a column title, or name it with"):
        inference.like_trained(row, saved)


@pytest.fixture
def trained_on(tmp_path, setting):
    """`trained_on(*columns)`: an artifact of a classification on rows with these columns."""

    def make(*columns):
        one = setting()
        artifact.save(
            tmp_path / "model", model=one.model, tokenizer=one.tokenizer, task=one.task, labels=one.labels,
            base_config=one.model.config.to_dict(), edits=[], columns=columns,
        )  # fmt: skip
        return artifact.load(tmp_path / "model")

    return make


SINGLE, PAIR = {"text": "a pine"}, {"text": "a pine", "text_pair": "no oak"}


def test_an_artifact_of_pairs_wants_pairs(trained_on):
    saved = trained_on("text", "label", "text_pair")
    assert len(list(inference.answers(saved, [PAIR], 2))) == 1
    with pytest.raises(
        DataError,
        match=r"^text 'a pine': has no text_pair, .* on; give \{\"text\": \"...\", \"text_pair\": \"...\"\}, or a file",
    ):
        list(inference.answers(saved, [PAIR, SINGLE], 2))


def test_an_artifact_of_texts_reads_no_pairs(trained_on):
    (alone,) = inference.answers(trained_on("text", "label"), [SINGLE], 1)
    (beside,) = inference.answers(trained_on("text", "label"), [PAIR], 1)
    assert beside == alone
    (paired,) = inference.answers(trained_on(), [PAIR], 1)  # not known: all that is there
    assert paired["text_pair"] == "no oak"


def test_an_artifact_is_scored_on_the_columns_that_it_was_trained_on(trained_on, tmp_path):
    single, pair = tmp_path / "single.csv", tmp_path / "pair.csv"
    single.write_text("text,label\na pine,yes\nan oak,no\n")
    pair.write_text("text,text_pair,label\na pine,tall,yes\nan oak,old,no\n")
    files = {path.stem: inference.WholeFile(train=str(path)) for path in (single, pair)}
    saved = trained_on("text", "label", "text_pair")
    paired, _ = inference.scores(saved, files["pair"])
    with pytest.raises(DataError, match=r"single\.csv: no column 'text_pair'; found text, label"):
        inference.scores(saved, files["single"])
    alone, _ = inference.scores(trained_on("text", "label"), files["single"])
    assert inference.scores(trained_on("text", "label"), files["pair"])[0] == alone
    assert paired["loss"] != alone["loss"]
