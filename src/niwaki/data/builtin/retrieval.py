"""Invented titles that somebody has read, and the one that may come next."""

from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.generated import Draws, Generated, Row

GENRES = {
    "horror": ("The Haunted {place}", "Ghosts of the {place}", "Terror in the {place}", "The Cursed {place}"),
    "romance": ("Love in the {place}", "A Kiss at the {place}", "Hearts of the {place}", "The {place} Wedding"),
    "crime": ("Murder in the {place}", "The {place} Detective", "A Body at the {place}", "Thieves of the {place}"),
    "science": ("The {place} on Mars", "Robots of the {place}", "The Starship {place}", "The Galactic {place}"),
    "cooking": ("Recipes from the {place}", "Soups of the {place}", "Baking at the {place}", "The {place} Cookbook"),
    "history": (
        "The {place} Emperors",
        "Kings of the {place}",
        "The {place} in the Middle Ages",
        "The Siege of the {place}",
    ),
}
PLACES = """Lighthouse Harbour Castle Orchard Library Theatre Valley Island Mill Bridge Tower Garden Museum Hotel Railway
    Monastery""".split()
SERIES = "Amber Copper Crystal Ivory Marble Scarlet Velvet Winter".split()
SERIES_NOUNS = "Crown Forest Key Mirror Sword Throne".split()
PARTS = "One Two Three Four Five Six".split()
NEGATIVES = 2  # to each title that comes next


@dataclass(frozen=True, kw_only=True)
class NextTitles(Generated):
    """`history`: three to six titles, oldest first; `candidate`: a title, `label` 1 where it is the next.

    Readers of series go on with the next part of one that they are in, not with a part that they have read, one
    too far ahead or another series. Readers of single books stay with their genre, which the titles tell, and read
    none twice. Two candidates that are not next come with each that is, in the same split."""

    apart: ClassVar[tuple[str, ...]] = ("history",)

    def draw(self, draws: Draws) -> list[Row]:
        history, following, wrong = draws.pick((_series, _genre))(draws)
        rows = [(following, 1), *((title, 0) for title in wrong)]
        return [{"history": history, "candidate": title, "label": label} for title, label in draws.shuffled(rows)]


Reader = tuple[list[str], str, list[str]]  # history, what is next, what is not


def _series(draws: Draws) -> Reader:
    """A reader of two series by turns, who stands at some part of each."""
    first, second, third = draws.some([f"The {one} {noun}" for one in SERIES for noun in SERIES_NOUNS], 3)
    reached = {first: 0, second: 0}
    history = []
    for _ in range(draws.between(3, 6)):
        name = draws.pick([name for name in reached if reached[name] < len(PARTS) - 2])
        reached[name] += 1
        history.append(_part(name, reached[name]))
    going_on = draws.pick([name for name, part in reached.items() if part])
    wrong = [draws.pick(history), _part(going_on, reached[going_on] + 2), _part(third, draws.between(1, len(PARTS)))]
    return history, _part(going_on, reached[going_on] + 1), draws.some(wrong, NEGATIVES)


def _part(name: str, number: int) -> str:
    return f"{name}, Part {PARTS[number - 1]}"


def _genre(draws: Draws) -> Reader:
    genre, *others = draws.some(list(GENRES), 1 + NEGATIVES)
    titles = [pattern.format(place=place) for pattern in GENRES[genre] for place in PLACES]
    *history, following = draws.some(titles, draws.between(4, 7))
    wrong = [draws.pick(GENRES[other]).format(place=draws.pick(PLACES)) for other in others]
    if draws.chance(0.3):
        wrong[0] = draws.pick(history)
    return history, following, wrong
