"""English and German: what stands there is what a German would write."""

import re

import pytest
from builtin_rows import check_generated, rows_of, splits_of
from sacrebleu.metrics import CHRF

from niwaki.data.builtin.english import in_words
from niwaki.data.builtin.translation import EnglishGerman, _german_ordinal, _german_year, _ordinal, _year, german


def test_the_rows_are_as_promised() -> None:
    check_generated(EnglishGerman(), {"source", "target"}, "3935724ef524", given=lambda row: row["source"])
    assert splits_of(EnglishGerman())["train"][0] == {
        "source": "eighty-five euros and seventy-seven cents",
        "target": "fünfundachtzig Euro und siebenundsiebzig Cent",
    }


@pytest.mark.parametrize(
    ("number", "english", "target"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (66, "sixty-six", "sechsundsechzig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (112, "one hundred and twelve", "einhundertzwölf"),
        (1001, "one thousand and one", "eintausendeins"),
        (1100, "one thousand one hundred", "eintausendeinhundert"),
        (4321, "four thousand three hundred and twenty-one", "viertausenddreihunderteinundzwanzig"),
        (21000, "twenty-one thousand", "einundzwanzigtausend"),
        (101000, "one hundred and one thousand", "einhunderteintausend"),
        (700017, "seven hundred thousand and seventeen", "siebenhunderttausendsiebzehn"),
    ],
)
def test_numbers_in_words(number: int, english: str, target: str) -> None:
    assert in_words(number) == english
    assert german(number) == target


def test_no_two_numbers_are_written_alike() -> None:
    numbers = [*range(12_000), *range(99_990, 101_200)]
    assert len({german(number) for number in numbers}) == len({in_words(number) for number in numbers}) == len(numbers)


def test_ordinals_and_years() -> None:
    assert [_ordinal(day) for day in (1, 2, 3, 4, 5, 8, 9, 12, 20, 21, 22, 23, 30, 31)] == [
        "first", "second", "third", "fourth", "fifth", "eighth", "ninth", "twelfth", "twentieth", "twenty-first",
        "twenty-second", "twenty-third", "thirtieth", "thirty-first",
    ]  # fmt: skip
    assert [_german_ordinal(day) + "en" for day in (1, 2, 3, 6, 7, 8, 12, 16, 17, 19, 20, 21, 30, 31)] == [
        "ersten", "zweiten", "dritten", "sechsten", "siebten", "achten", "zwölften", "sechzehnten", "siebzehnten",
        "neunzehnten", "zwanzigsten", "einundzwanzigsten", "dreißigsten", "einunddreißigsten",
    ]  # fmt: skip
    years = {1900: ("nineteen hundred", "neunzehnhundert"), 1905: ("nineteen oh five", "neunzehnhundertfünf"),
             1987: ("nineteen eighty-seven", "neunzehnhundertsiebenundachtzig"),
             2000: ("two thousand", "zweitausend"), 2005: ("two thousand and five", "zweitausendfünf"),
             2013: ("twenty thirteen", "zweitausenddreizehn")}  # fmt: skip
    assert {year: (_year(year), _german_year(year)) for year in years} == years


def test_every_kind_is_translated_as_by_hand() -> None:
    rows = {row["source"]: row["target"] for n in (2000, 12000) for row in rows_of(EnglishGerman(rows=n))}
    expected = {
        "at half past three in the afternoon": "um halb vier nachmittags",
        "at twenty-five past ten in the evening every day": "jeden Tag um fünf vor halb elf abends",
        "at twenty-five to six in the morning": "um fünf nach halb sechs morgens",
        "at a quarter to seven in the evening": "um Viertel vor sieben abends",
        "at a quarter past two in the afternoon every day": "jeden Tag um Viertel nach zwei nachmittags",
        "at ten o'clock in the morning on Tuesday": "am Dienstag um zehn Uhr morgens",
        "on Tuesday, the twenty-eighth of November nineteen ninety-five": "am Dienstag, "
        "dem achtundzwanzigsten November neunzehnhundertfünfundneunzig",
        "the tenth of February twenty twenty-nine": "der zehnte Februar zweitausendneunundzwanzig",
    }
    assert {source: rows.get(source) for source in expected} == expected
    for source, target in rows.items():
        assert re.fullmatch(r"[A-Za-z',\- ]+", source)
        assert re.fullmatch(r"[A-Za-zäöüÄÖÜß, ]+", target)
        assert not re.search(r"\beins (Euro|Cent|Uhr)\b", target)


def test_copying_is_no_translation() -> None:
    """Copying the source: no row exactly right, chrF 17; the right German has chrF 100."""
    rows = rows_of(EnglishGerman())
    sources, targets = [row["source"] for row in rows], [row["target"] for row in rows]
    assert not set(sources) & set(targets)
    assert CHRF().corpus_score(sources, [targets]).score < 25
