"""Tables of places to eat: every sentence says all of its table and nothing else."""

import re

from builtin_rows import check_generated, rows_of, splits_of
from sacrebleu.metrics import BLEU, CHRF

from niwaki.data.builtin.table_to_text import FIELDS, PlacesToEat

SAID = {
    ("familyFriendly", "yes"): r"(It|,|and) (is family-friendly|welcomes families with children)",
    ("familyFriendly", "no"): r"is not family-friendly|is not a place for children",
}


def said(field: str, value: str, text: str) -> bool:
    pattern = SAID.get((field, value))
    if field == "food":
        pattern = rf"\b{value} (food|dishes|restaurant|pub|coffee shop)\b"
    elif field == "customer rating":
        pattern = rf"\b(an?) {value} customer rating|is rated {value} by its customers"
    elif field == "near":
        pattern = rf"\bnear {value}\b"
    return bool(re.search(pattern or re.escape(value), text, re.IGNORECASE))


def test_the_rows_are_as_promised() -> None:
    columns = {"source", "target", "references"}
    check_generated(PlacesToEat(), columns, "d92034e08d49", given=lambda row: row["source"])
    first = splits_of(PlacesToEat())["train"][0]
    assert first["source"] == "name[The Green Lantern], eatType[pub], area[riverside], familyFriendly[no]"
    assert (
        first["target"] == "By the riverside there is a pub called The Green Lantern. It is not a place for children."
    )


def test_every_table_has_three_rows_with_all_references() -> None:
    for rows in splits_of(PlacesToEat()).values():
        for row in rows:
            assert row["target"] in row["references"]
            assert len(set(row["references"])) == 3
        sources = [row["source"] for row in rows]
        # The very last table drawn may be cut off at the number of rows.
        assert sum(sources.count(source) != 3 for source in set(sources)) <= 1


def test_references_say_every_field_and_no_other() -> None:
    for row in rows_of(PlacesToEat()):
        table = dict(re.findall(r"([\w ]+)\[([^\]]+)\](?:, )?", row["source"]))
        assert list(table)[:2] == ["name", "eatType"]
        assert 3 <= len(table) - 1 + 1 <= 8
        for text in row["references"]:
            assert table["name"] in text
            for field, values in FIELDS.items():
                assert {value for value in values if said(field, value, text)} == {table[field]} - {None} \
                    if field in table else not [value for value in values if said(field, value, text)]  # fmt: skip


def test_copying_and_a_fixed_sentence_are_far_off() -> None:
    """BLEU with all references: the table as it is 2 (chrF 48), one fixed text 22, a reference by the other two 67."""
    rows = [row for row in rows_of(PlacesToEat()) if row["target"] == row["references"][0]]
    references = [[row["references"][n] for row in rows] for n in range(3)]
    sources = [row["source"] for row in rows]
    assert BLEU().corpus_score(sources, references).score < 10
    assert CHRF().corpus_score(sources, references).score < 50
    others = [row["references"][0] for row in rows]
    assert BLEU().corpus_score(others, references[1:]).score > 45
    assert BLEU().corpus_score([others[0]] * len(rows), references).score < 35
