"""Small talks to get something done: book a table, order in a café, find the way."""

from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.english import DAYS, PEOPLE, in_words, listed
from niwaki.data.builtin.generated import Draws, Generated, Row

Talk = list[str]  # by turns, a guest first; the other side says the last word

BOOKING = {  # what must be known: how it is asked for, how it is given
    "people": ("For how many people?", ("There will be {} of us.", "For {}, please.", "We are {}.")),
    "day": ("For which day?", ("{}, please.", "On {}.", "{} would be best.")),
    "hour": ("At what time?", ("At {}.", "Around {}.", "We would like to come at {}.")),
    "name": ("Under which name?", ("{}.", "My name is {}.", "{}, please.")),
}
OPENINGS = (
    "Hello, I would like to book a table{}.",
    "Good evening, do you have a table{}?",
    "Hi, can I reserve a table{}?",
)
PRICES = {"coffee": 3, "tea": 2, "lemonade": 4, "sandwich": 6, "pancake": 5, "muffin": 3}  # euros
STREET = "bank bakery church cinema library museum pharmacy school station theatre".split()  # from the west to the east


@dataclass(frozen=True, kw_only=True)
class ErrandTalks(Generated):
    """`history`: the turns of a talk so far, a guest first; `response`: the only thing to say then, for it follows
    from what was said: what is not known yet is asked for, changes count, bills are added up, and Main Street has its
    houses in one order in all talks."""

    apart: ClassVar[tuple[str, ...]] = ("history",)

    def draw(self, draws: Draws) -> list[Row]:
        talk = draws.pick((_book, _order, _order, _find))(draws)
        turns = 2 * draws.between(1, len(talk) // 2)
        return [{"history": talk[: turns - 1], "response": talk[turns - 1]}]


def _book(draws: Draws) -> Talk:
    known: dict[str, str] = {}
    values = {
        "people": in_words(draws.between(2, 9)),
        "day": draws.pick(DAYS),
        "hour": in_words(draws.between(5, 10)),
        "name": draws.pick(PEOPLE),
    }
    given = ""
    for fact, pattern in (("people", " for {}"), ("day", " on {}"), ("hour", " at {}")):
        if draws.chance(0.4):
            known[fact] = values[fact]
            given += pattern.format(values[fact])
    talk = [draws.pick(OPENINGS).format(given)]
    for fact, (question, answers) in BOOKING.items():
        if fact not in known:
            talk += [question, draws.pick(answers).format(values[fact])]
            talk[-1] = talk[-1][0].upper() + talk[-1][1:]
    talk.append(_repeat(values))
    if draws.chance(0.5):
        fact, changed = draws.pick(
            (
                ("people", in_words(draws.between(2, 9))),
                ("day", draws.pick(DAYS)),
                ("hour", in_words(draws.between(5, 10))),
            )
        )
        if changed != values[fact]:
            values[fact] = changed
            wording = {"people": "make it a table for {}", "day": "make it {}", "hour": "make it {} o'clock"}[fact]
            talk += [f"Sorry, could you {wording.format(changed)}?", _repeat(values)]
    return [*talk, "Yes, that is right.", f"Thank you, {values['name']}. We will see you on {values['day']}."]


def _repeat(values: dict[str, str]) -> str:
    return "That is a table for {people} on {day} at {hour}, under the name of {name}. Is that right?".format(**values)


def _order(draws: Draws) -> Talk:
    counts: dict[str, int] = {}
    talk: Talk = []
    for opening in ("Hello, I would like {}, please.", "And {}, please.", "Then {} as well.")[: draws.between(1, 3)]:
        wanted = {draws.pick(list(PRICES)): draws.between(1, 3) for _ in range(draws.between(1, 2))}
        for thing, count in wanted.items():
            counts[thing] = counts.get(thing, 0) + count
        talk += [opening.format(_things(wanted)), "Anything else?"]
    if draws.chance(0.4) and len(counts) > 1:
        gone = draws.pick(list(counts))
        things = _plural(gone, counts.pop(gone))
        talk += [
            f"I have changed my mind: please leave out the {things}.",
            f"Fine, without the {things}. Anything else?",
        ]
    total = sum(PRICES[thing] * count for thing, count in counts.items())
    talk += ["No, that is all.", f"So that is {_things(counts)}. {total} euros, please."]
    note = next(note for note in (5, 10, 20, 50, 100) if note >= total)
    change = f"and {note - total} euros change" if note > total else "that is exactly right"
    return [*talk, f"Here are {note} euros.", f"Thank you, {change}."]


def _things(counts: dict[str, int]) -> str:
    return listed([f"{'a' if n == 1 else in_words(n)} {_plural(thing, n)}" for thing, n in counts.items()])


def _plural(thing: str, count: int) -> str:
    return thing if count == 1 else f"{thing}es" if thing.endswith("ch") else f"{thing}s"


def _find(draws: Draws) -> Talk:
    start, goal, further = draws.some(STREET, 3)
    opening = draws.pick(
        ("Excuse me, how do I get to the {}?", "Hello, where is the {}, please?", "I am looking for the {}.")
    )
    talk = [
        opening.format(goal),
        "Where are you now?",
        f"{draws.pick(('I am at the', 'Right in front of the', 'At the'))} {start}.",
    ]
    talk.append(_way(start, goal))
    talk += [f"And from there to the {further}?", _way(goal, further)]
    return [*talk, f"And how do I get back to the {start}?", _way(further, start)] if draws.chance(0.5) else talk


def _way(start: str, goal: str) -> str:
    steps = STREET.index(goal) - STREET.index(start)
    side, count = ("east" if steps > 0 else "west"), abs(steps)
    passed = STREET[STREET.index(goal) - (1 if steps > 0 else -1)]
    if count == 1:
        return f"Go {side} along Main Street. The {goal} is the next house."
    return f"Go {side} along Main Street. The {goal} is {in_words(count)} houses further on, just after the {passed}."
