"""Everyday questions with three to five answers, one of them right."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from niwaki.data.builtin.english import DAYS, MONTHS, PEOPLE, in_words, with_article
from niwaki.data.builtin.generated import Draws, Generated, Row

KINDS = {
    "animal": "cat horse sparrow frog whale goat".split(),
    "fruit": "pear plum banana cherry lemon melon".split(),
    "tool": "hammer saw screwdriver shovel axe rake".split(),
    "musical instrument": "violin trumpet flute drum guitar organ".split(),
    "vehicle": "bus lorry tram bicycle tractor van".split(),
    "piece of clothing": "coat shirt skirt jumper scarf hat".split(),
    "piece of furniture": "table wardrobe chair sofa bookcase desk".split(),
}
# From the least to the most.
ORDERS = {
    ("lightest", "heaviest"): "ant, mouse, cat, sheep, horse, elephant, blue whale".split(", "),
    ("shortest", "longest"): "second, minute, hour, day, week, month, year, century".split(", "),
    ("slowest", "fastest"): "snail, person on foot, bicycle, express train, jet plane, space rocket".split(", "),
    ("smallest", "largest"): "village, town, big city, country, continent, planet".split(", "),
    ("coldest", "hottest"): "ice cube, glass of tap water, bath for a baby, cup of fresh coffee, candle flame".split(
        ", "
    ),
}
MEANS = {
    "cut a piece of paper": "pair of scissors",
    "open a locked door": "key",
    "know what time it is": "clock",
    "stay dry in the rain": "umbrella",
    "see something very small": "microscope",
    "boil water": "kettle",
    "sweep the floor": "broom",
    "look at the stars": "telescope",
    "find out how warm it is": "thermometer",
    "weigh a parcel": "pair of scales",
    "light up a dark cellar": "torch",
    "put a nail into a wall": "hammer",
}
PLACES = {
    "borrow a book": "library",
    "buy bread": "bakery",
    "see a doctor": "hospital",
    "catch a train": "railway station",
    "watch a film": "cinema",
    "see old paintings": "museum",
    "post a letter": "post office",
    "swim": "swimming pool",
    "buy medicine": "pharmacy",
    "board a plane": "airport",
}
OPPOSITES = {
    "hot": "cold", "early": "late", "full": "empty", "heavy": "light", "noisy": "quiet", "rich": "poor",
    "wet": "dry", "cheap": "expensive", "strong": "weak", "narrow": "wide",
}  # fmt: skip
COUNTED = "apples books marbles stamps biscuits pencils".split()


@dataclass(frozen=True, kw_only=True)
class EverydayQuestions(Generated):
    """`question`, three to five `choices`, and as `label` the place of the right one, each place as likely. Asked are
    kinds, orders of size, what something is for, places, opposites, days, months, hours and small sums."""

    def draw(self, draws: Draws) -> list[Row]:
        question, right, wrong = draws.pick(ASKED)(draws)
        count = draws.between(3, 5)
        label = draws.between(0, count - 1)
        choices = draws.some([choice for choice in wrong if choice != right], count - 1)
        return [{"question": question, "choices": [*choices[:label], right, *choices[label:]], "label": label}]

    def identity(self, row: Row) -> str:
        return json.dumps([row["question"], sorted(row["choices"])])


Asked = tuple[str, str, Sequence[str]]  # the question, the right answer, wrong ones, four or more


def _kind(draws: Draws) -> Asked:
    right, *others = draws.some(list(KINDS), 5)
    return f"Which of these is {with_article(right)}?", draws.pick(KINDS[right]), [draws.pick(KINDS[k]) for k in others]


def _odd_one(draws: Draws) -> Asked:
    kind, other = draws.some(list(KINDS), 2)
    return f"Which of these is not {with_article(kind)}?", draws.pick(KINDS[other]), KINDS[kind]


def _order(draws: Draws) -> Asked:
    least, most = draws.pick(list(ORDERS))
    things = ORDERS[least, most]
    chosen = sorted(draws.some(range(len(things)), 5))
    at_most = draws.chance(0.5)
    right, *wrong = [things[place] for place in (reversed(chosen) if at_most else chosen)]
    return f"Which of these is the {most if at_most else least}?", right, wrong


def _means(draws: Draws) -> Asked:
    right, *others = draws.some(list(MEANS), 5)
    question = draws.pick(("{who} wants to {end}. What does {who} need?", "What do you use to {end}?"))
    means = [with_article(MEANS[end]) for end in (right, *others)]
    return question.format(who=draws.pick(PEOPLE), end=right), means[0], means[1:]


def _place(draws: Draws) -> Asked:
    right, *others = draws.some(list(PLACES), 5)
    question = draws.pick(("{who} would like to {end}. Where should {who} go?", "Where do people go to {end}?"))
    return question.format(who=draws.pick(PEOPLE), end=right), *_the([PLACES[end] for end in (right, *others)])


def _the(places: list[str]) -> tuple[str, list[str]]:
    right, *wrong = [f"to the {place}" for place in places]
    return right, wrong


def _opposite(draws: Draws) -> Asked:
    right, *others = draws.some(list(OPPOSITES), 5)
    word, answer = (right, OPPOSITES[right]) if draws.chance(0.5) else (OPPOSITES[right], right)
    return f"What is the opposite of {word}?", answer, [draws.pick((other, OPPOSITES[other])) for other in others]


def _day(draws: Draws) -> Asked:
    names, unit = draws.pick(((DAYS, "day"), (MONTHS, "month")))
    now, steps = draws.between(0, len(names) - 1), draws.between(1, 4)
    later = draws.chance(0.6)
    right = names[(now + (steps if later else -steps)) % len(names)]
    units = unit if steps == 1 else f"{unit}s"
    tense = f"will it be in {in_words(steps)} {units}" if later else f"was it {in_words(steps)} {units} ago"
    return f"It is {names[now]}. Which {unit} {tense}?", right, names


def _hours(draws: Draws) -> Asked:
    start, hours = draws.between(1, 7), draws.between(2, 5)
    what = draws.pick(("The film", "The meeting", "The party", "The train journey", "The lesson"))
    clock = [f"at {in_words(hour)} o'clock" for hour in range(1, 13)]
    question = f"{what} begins at {in_words(start)} o'clock and takes {in_words(hours)} hours. When does it end?"
    return question, clock[start + hours - 1], clock


def _sum(draws: Draws) -> Asked:
    (who, other), thing = draws.some(PEOPLE, 2), draws.pick(COUNTED)
    first, second = draws.between(4, 12), draws.between(2, 3)
    numbers = [in_words(number) for number in range(1, 17)]
    if draws.chance(0.5):
        question = f"{who} has {in_words(first)} {thing} and gives {in_words(second)} of them to {other}. " \
                   f"How many {thing} does {who} have left?"  # fmt: skip
        return question, in_words(first - second), numbers
    question = f"{who} has {in_words(first)} {thing} and gets {in_words(second)} more from {other}. " \
               f"How many {thing} does {who} have now?"  # fmt: skip
    return question, in_words(first + second), numbers


ASKED = (_kind, _odd_one, _order, _means, _place, _opposite, _day, _hours, _sum)
