"""Question answering: windows and where answers stand in them, the best span over windows, scores by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from niwaki import compose
from niwaki.errors import ConfigError, DataError
from niwaki.task.question_answering import AnswerScores, QuestionAnswering, ends_of
from niwaki.task.spans import Best, Span, chinese, english, longest_run, spans_of, units, without_signs

CONTEXT = "ada cut the old pine in may. bob held it. eve ran home, and sang of it all night long."


def rows(*answers: str) -> dict[str, list[Any]]:
    given = [{"text": [a] if a else [], "answer_start": [CONTEXT.index(a)] if a else []} for a in answers]
    return {"context": [CONTEXT] * len(answers), "question": ["who ran?"] * len(answers), "answers": given}


def text_at(one: Any, row: dict[str, Any], ends: list[int]) -> str:
    """What stands from the first to the last of two tokens of a window."""
    text = bytes(row["text"]).decode()
    return text[row["places"][2 * ends[0]] : row["places"][2 * ends[1] + 1]]


def test_every_answer_stands_where_its_window_says(setting: Callable[..., Any]) -> None:
    one = setting(task="question_answering")
    for answer in ("ada", "old pine", "bob", "eve", "all night", "."):
        features = one.features(rows(answer))
        assert len(features) > 3
        whole = [row for row in features if row["labels"] != [0, 0]]
        assert whole, answer
        assert {text_at(one, row, row["labels"]) for row in whole} == {answer}
        for row in features:  # elsewhere the answer is not whole in the window
            text, begin = bytes(row["text"]).decode(), row["begin"]
            at = CONTEXT.index(answer)
            inside = begin <= at and at + len(answer) <= begin + len(text)
            assert inside == (row["labels"] != [0, 0])
    assert all(row["labels"] == [0, 0] for row in one.features(rows("")))


def test_windows_cover_the_text_and_share_the_stride(setting: Callable[..., Any]) -> None:
    one = setting(task="question_answering")
    features = one.features(rows("ada"))
    assert all(len(row["input_ids"]) == row["length"] <= 32 for row in features)
    covered: set[int] = set()
    tokens = []
    for row in features:
        pairs = list(zip(row["places"][::2], row["places"][1::2], strict=True))
        inside = [(row["begin"] + a, row["begin"] + b) for a, b in pairs if a >= 0]
        covered |= {place for a, b in inside for place in range(a, b)}
        tokens.append(inside)
    assert covered == {i for i, character in enumerate(CONTEXT) if not character.isspace()}
    assert all(len(set(a) & set(b)) == 8 for a, b in itertools.pairwise(tokens))


def test_the_loss_is_that_of_transformers(setting: Callable[..., Any]) -> None:
    """The mean of both cross-entropies; theirs also runs over tokens of the question, so these are hidden there too."""
    one = setting(task="question_answering")
    batch = one.batch(rows("ada", "bob"))
    with torch.no_grad():
        outputs = one.model(**one.task.inputs(batch))
        ours = one.task.loss(outputs, batch)
    hidden = batch["places"][..., 0] < 0
    hidden[:, 0] = False
    parts = [
        torch.nn.functional.cross_entropy(logits.masked_fill(hidden, -1e4), batch["labels"][:, side])
        for side, logits in enumerate((outputs.start_logits, outputs.end_logits))
    ]
    assert float(ours) == pytest.approx(float(sum(parts) / 2), rel=1e-5)
    assert torch.equal(outputs.logits[..., 1], outputs.end_logits)
    assert one.task.owners(outputs, batch).tolist() == list(range(len(batch["example"]))) * 2


def test_the_best_span_by_hand() -> None:
    """Tokens [CLS] q | a b c: the best pair in order and not too long; (c, a) is higher, but ends before it begins."""
    places = torch.tensor([[-1, -1], [-1, -1], [0, 1], [2, 3], [4, 5]])
    logits = torch.tensor([[0.5, 0.5], [9.0, 9.0], [1.0, 5.0], [2.0, 1.0], [7.0, 3.0]])
    found = spans_of(logits, places, 100, "a b c", 3, 2)
    assert found[0] == Span("", None, 1.0)
    assert found[1:] == [Span("c", 104, 10.0), Span("a", 100, 6.0), Span("b c", 102, 5.0)]
    one_token = spans_of(logits, places, 0, "a b c", 20, 1)
    assert {span.text for span in one_token} == {"", "a", "b", "c"}


def test_blanks_that_belong_to_a_token_are_none_of_the_answer() -> None:
    """As byte-level tokenizers have it: " b" and "b " say the same."""
    places = torch.tensor([[-1, -1], [0, 1], [1, 3], [2, 4]])
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 4.0], [3.0, 3.0]])
    found = spans_of(logits, places, 10, "a b ", 2, 1)
    assert found == [Span("", None, 0.0), Span("b", 12, 8.0)]


def test_smoothing_goes_to_tokens_of_the_text_alone(setting: Callable[..., Any]) -> None:
    one = setting(task="question_answering")
    batch = one.batch(rows("ada", "bob"))
    logits = torch.randn(*batch["input_ids"].shape, 2, requires_grad=True)
    outputs = SimpleNamespace(logits=logits)
    smooth, plain = (one.task.loss(outputs, batch, smoothing=s) for s in (0.1, 0.0))
    exact = torch.nn.functional.cross_entropy(one.task.predictions(outputs, batch), batch["labels"].T.flatten())
    assert float(plain.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    assert float(smooth.detach()) < 2 * float(plain.detach())
    smooth.backward()
    assert torch.allclose(logits.grad.sum(1), torch.zeros(len(logits), 2), atol=1e-6)


def test_the_best_over_windows_and_no_answer() -> None:
    best = Best(3)
    best.add([Span("", None, 4.0), Span("a", 0, 3.0)])
    best.add([Span("", None, 2.0), Span("b", 9, 2.5), Span("a", 0, 1.0)])
    assert best.answer(0.0) == Span("a", 0, 3.0)  # the least of no answer is 2
    assert best.answer(-1.5).text == ""
    best.add([Span("", None, 9.0)])
    assert best.answer(0.0).text == "a"
    assert best.answer(-100.0).text == ""
    assert best.answer(None).text == "a"
    chances = best.chances()
    assert [span.text for span, _ in chances] == ["a", "b", ""]
    assert [chance for _, chance in chances] == pytest.approx(torch.tensor([3.0, 2.5, 2.0]).softmax(0).tolist())
    empty = Best(3)
    empty.add([Span("", None, -5.0)])
    assert empty.answer(0.0).text == empty.answer(None).text == ""


def test_that_there_always_is_an_answer_can_be_set() -> None:
    task = compose.build(compose.compose(["task=question_answering", "task.null_threshold=null"]).config).task
    assert isinstance(task, QuestionAnswering)
    assert task.null_threshold is None


@pytest.mark.parametrize(
    ("found", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["Eiffel tower"], 1.0, 1.0),  # case, article, punctuation
        ("the big Eiffel Tower", ["Eiffel tower", "tower"], 0.0, 0.8),  # the better of two
        ("tower tower", ["tower"], 0.0, 2 / 3),  # a word counts as often as it is in both
        ("", [], 1.0, 1.0),
        ("tower", [], 0.0, 0.0),
        ("", ["tower"], 0.0, 0.0),
        ("a", ["the"], 1.0, 1.0),  # nothing is left of either
        ("U.S.", ["US"], 1.0, 1.0),
        ("", ["the", "tower"], 0.0, 0.0),  # an answer of which nothing is left is none, beside one that is
    ],
)
def test_official_english_scores(found: str, answers: list[str], exact: float, f1: float) -> None:
    scores = english([found], [answers])
    assert scores == {"exact": pytest.approx(exact), "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("found", "answers", "exact", "f1"),
    [
        ("北京大学", ["北京大学。"], 1.0, 1.0),
        ("北京", ["北京大学"], 0.0, 2 * 2 / 6),
        ("大北京", ["北京大学"], 0.0, 2 * 2 / 7),  # the longest run, not the bag of characters
        ("1998 年", ["1998年", "年"], 0.0, 1.0),  # a blank inside counts
        ("3.5", ["35"], 0.0, 0.0),  # a point is none of the signs that are left out
        ("3-5", ["35"], 1.0, 1.0),
        ("New York", ["new york"], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("年", [], 0.0, 0.0),
    ],
)
def test_official_chinese_scores(found: str, answers: list[str], exact: float, f1: float) -> None:
    assert chinese([found], [answers]) == {"exact": pytest.approx(exact), "f1": pytest.approx(f1)}


def test_the_language_is_that_of_what_is_right() -> None:
    """Unless it is told: characters for Chinese answers, words for others, each row by itself."""
    found, wanted = ["北京大学的", "the oak"], [["北京大学"], ["oak tree"]]
    alike = {language: AnswerScores(QuestionAnswering(language=language))._alike for language in (None, "en", "zh")}
    assert alike[None](found, wanted)["f1"] == pytest.approx((8 / 9 + 2 / 3) / 2)
    assert alike["en"](found, wanted)["f1"] == pytest.approx((0 + 2 / 3) / 2)
    assert alike["zh"](found, wanted)["f1"] == chinese(found, wanted)["f1"]


def test_units_and_runs() -> None:
    assert units(without_signs("他在 New York ，1998年!")) == ["他", "在", "new", "york", "1998", "年", "!"]
    assert longest_run("abcde", "xbcdy") == 3
    assert longest_run("", "a") == 0


def test_scores_gather_windows_of_a_row(setting: Callable[..., Any]) -> None:
    one = setting(task="question_answering")
    features = one.features(rows("bob", ""))
    scores = one.task.scores(())
    for start in range(0, len(features), 3):
        batch = one.task.collate(features[start : start + 3], one.tokenizer)
        logits = torch.zeros(*batch["input_ids"].shape, 2)
        for number, (row, (first, last)) in enumerate(zip(batch["example"], batch["labels"], strict=True)):
            if first or int(row) == 1:  # the true ends, or no answer, and nothing elsewhere
                logits[number, first, 0] = logits[number, last, 1] = 8.0
        scores.update(SimpleNamespace(logits=logits), batch)
    found = scores.compute()
    assert (found["exact"], found["f1"], found["has_answer_f1"], found["no_answer_f1"]) == (1.0, 1.0, 1.0, 1.0)


def test_answers_name_their_place(setting: Callable[..., Any]) -> None:
    one = setting(task="question_answering")
    given = [{"context": CONTEXT, "question": "who ran?"}, {"context": "eve ran.", "question": "who?", "id": "b"}]
    with torch.no_grad():
        said = list(one.task.answers(one.model, one.tokenizer, (), given))
    for row in said:
        if row["answer"]:
            assert row["context"][row["start"] :].startswith(row["answer"])
        assert row["n_best"]
        assert json.dumps(row)
    assert said[1]["id"] == "b"


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"stride": 384}, "stride"), ({"best": 0}, "best"), ({"max_answer_length": 0}, "max_answer_length")],
)
def test_refusals_name_the_field(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^task\.{name}="):
        QuestionAnswering(**fields)


def test_a_question_leaves_room_for_a_text(setting: Callable[..., Any]) -> None:
    one = setting(task="question_answering")
    with pytest.raises(DataError, match=r"^question 'x x x .* leave no room for a text .*raise max_length"):
        one.features({**rows("ada"), "question": ["x " * 40]})


def test_an_answer_that_is_not_whole_counts_as_none() -> None:
    places = [(-1, -1), (4, 6), (7, 9)]
    assert ends_of({"text": ["cd"], "answer_start": [7]}, places) == [2, 2]
    assert ends_of({"text": ["b cd e"], "answer_start": [5]}, places) == [0, 0]
    assert ends_of({"text": ["x"], "answer_start": [0]}, places) == [0, 0]
