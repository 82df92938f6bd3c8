"""Places to eat as tables, in the notation of the E2E challenge, and sentences that say the same."""

from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.english import listed, with_article
from niwaki.data.builtin.generated import Draws, Generated, Row

# The fields in their order, and their values; a name is of two parts.
FIRST = "Blue Golden Old Green Red Silver".split()
SECOND = "Anchor Lantern Plough Garden Swan Mill Oak Harbour".split()
FIELDS = {
    "eatType": ("restaurant", "pub", "coffee shop"),
    "food": ("Italian", "French", "Indian", "Japanese", "English", "Chinese"),
    "priceRange": ("less than £20", "£20-25", "more than £30"),
    "customer rating": ("low", "average", "excellent"),
    "area": ("riverside", "city centre"),
    "familyFriendly": ("yes", "no"),
    "near": ("the station", "the old bridge", "the theatre", "the park"),
}
REFERENCES = 3  # of each table


@dataclass(frozen=True, kw_only=True)
class PlacesToEat(Generated):
    """`source`: "name[The Blue Mill], eatType[pub], food[French]" with three to seven of the fields; `target`: one or two
    sentences that say all of it and nothing else. Each table has three rows, which are in one split; `references`:
    the targets of all three."""

    apart: ClassVar[tuple[str, ...]] = ("source",)

    def draw(self, draws: Draws) -> list[Row]:
        given = set(draws.some(list(FIELDS)[1:], draws.between(2, 6))) | {"eatType"}
        table = {"name": f"The {draws.pick(FIRST)} {draws.pick(SECOND)}"}
        table |= {name: draws.pick(values) for name, values in FIELDS.items() if name in given}
        references: dict[str, None] = {}
        while len(references) < REFERENCES:
            references[_described(table, draws)] = None
        source = ", ".join(f"{name}[{value}]" for name, value in table.items())
        return [{"source": source, "target": text, "references": list(references)} for text in references]


def _described(table: dict[str, str], draws: Draws) -> str:
    """A sentence with the kind and what fits beside it, and one with the rest."""
    name, kind = table["name"], table["eatType"]
    left = {field: value for field, value in table.items() if field not in ("name", "eatType")}
    thing, serving = with_article(kind), ""
    if "food" in left and draws.chance(0.3):
        thing = with_article(f"{left.pop('food')} {kind}")
    elif "food" in left and draws.chance(0.4):
        serving = f" that serves {left.pop('food')} food"
    place = " ".join(_where(field, left.pop(field)) for field in draws.shuffled(("area", "near")) if field in left)
    place = f" {place}" if place else ""
    called = f"there is {thing} called {name}{serving}"
    first = draws.pick((f"{name} is {thing}{serving}{place}.", f"{called}{place}.", f"{place} {called}.".strip()))
    first = first[0].upper() + first[1:]
    says = [_said(field, value, draws) for field, value in draws.shuffled(list(left.items()))]
    if not says:
        return first
    return f"{first} It {listed(says)}."


def _where(field: str, value: str) -> str:
    if field == "near":
        return f"near {value}"
    return f"by the {value}" if value == "riverside" else f"in the {value}"


def _said(field: str, value: str, draws: Draws) -> str:
    """What follows `It`."""
    if field == "food":
        return draws.pick((f"serves {value} food", f"offers {value} dishes"))
    if field == "priceRange":
        return draws.pick((f"has meals for {value}", f"charges {value} for a meal"))
    if field == "customer rating":
        return draws.pick((f"has {with_article(value)} customer rating", f"is rated {value} by its customers"))
    welcome = {"yes": ("is family-friendly", "welcomes families with children"),
               "no": ("is not family-friendly", "is not a place for children")}  # fmt: skip
    return draws.pick(welcome[value])
