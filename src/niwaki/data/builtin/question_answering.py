"""Questions on texts about invented people, towns and ships."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.english import MEN, MONTHS, WOMEN, with_article
from niwaki.data.builtin.generated import Draws, Generated, Row

# Of each kind: what can be said of it, in two ways, and how it is asked for.
KINDS: dict[str, dict[str, tuple[str, str, str]]] = {
    "person": {
        "birthplace": ("{it} was born in {value}.", "{it} comes from {value}.", "Where was {it} born?"),
        "birthday": ("{it} was born on {value}.", "{it} turns a year older on {value}.", "When is {it}'s birthday?"),
        "work": ("{it} works as {value}.", "{it} earns a living as {value}.", "What is {it}'s profession?"),
        "music": ("{it} plays the {value}.", "{it} has learned the {value}.", "Which instrument does {it} play?"),
        "home": ("{it} now lives in {value}.", "{it} has settled in {value}.", "Where does {it} live now?"),
        "friend": ("{it} is a close friend of {value}.", "{it} went to school with {value}, who became a dear friend.",
                   "Who is {it} friends with?"),
    },
    "town": {
        "river": ("{it} lies on the river {value}.", "{it} was built on the banks of the {value}.",
                  "Which river flows through {it}?"),
        "people": ("{it} has {value} inhabitants.", "{it} is home to {value} people.", "How many people live in {it}?"),
        "founded": ("{it} was founded in {value}.", "{it} dates back to {value}.", "In which year was {it} founded?"),
        "mayor": ("{it} has {value} as its mayor.", "{it} is governed by {value}.", "Who is the mayor of {it}?"),
        "fame": ("{it} is famous for its {value}.", "{it} attracts visitors with its {value}.",
                 "What is {it} known for?"),
    },
    "ship": {
        "built": ("{it} was launched in {value}.", "{it} first put to sea in {value}.", "In which year was {it} launched?"),
        "length": ("{it} is {value} long.", "{it} measures {value} from bow to stern.", "How long is {it}?"),
        "captain": ("{it} is under the command of {value}.", "{it} has {value} as its captain.", "Who commands {it}?"),
        "port": ("{it} is registered in {value}.", "{it} has its home in {value}.",
                 "What is the home port of {it}?"),
        "cargo": ("{it} usually carries {value}.", "{it} was built to carry {value}.", "What does {it} transport?"),
    },
}  # fmt: skip
WORK = "baker teacher painter gardener engineer librarian dentist astronomer tailor".split()
INSTRUMENTS = "violin cello trumpet harp flute accordion clarinet".split()
FAME = ["old bridge", "glass museum", "spring market", "stone tower", "botanical garden", "cheese"]
CARGO = "timber coffee wool salt grain marble".split()
BEGINNINGS = "Bran Cor Del El Fen Gar Hol Ker Lun Mar Nor Os Pel Ros Sel Tor Val Wen".split()
TOWNS = "burg ford holm mouth stead wick".split()
SURNAMES = "adine asen elin ender ikar onna".split()
RIVERS = "a el ena is une".split()
SHIPS = ("Grey Silver Golden Crimson White Green".split(), "Heron Swallow Falcon Swan Petrel Gannet".split())
SHARE_UNANSWERED, SHARE_LONG = 0.2, 0.2
QUESTIONS = 3  # on each text


@dataclass(frozen=True, kw_only=True)
class InventedFacts(Generated):
    """`context`: a few sentences, in one of five cases several hundred words; three questions each, whose `answers`
    stand at their offset, in characters. One in five asks for what the text does not say of the one it names, and
    has no answer."""

    apart: ClassVar[tuple[str, ...]] = ("context",)

    def draw(self, draws: Draws) -> list[Row]:
        kinds = [draws.pick(list(KINDS)) for _ in range(draws.between(14, 20) if draws.chance(SHARE_LONG) else 3)]
        context, answers = "", dict[tuple[str, str, str], tuple[str, int]]()
        for kind, name in zip(kinds, _names(kinds, draws), strict=True):
            for number, fact in enumerate(draws.some(list(KINDS[kind]), draws.between(2, 4))):
                subject = name if number == 0 or draws.chance(0.2) else _pronoun(kind, name)
                before, after = draws.pick(KINDS[kind][fact][:2]).format(it=subject, value="\n").split("\n")
                context += (" " if context else "") + before[0].upper() + before[1:]
                answers[kind, name, fact] = (value := _value(fact, draws), len(context))
                context += value + after
        missing = [(kind, name, fact) for kind, name, _ in answers for fact in KINDS[kind]]
        missing = sorted(set(missing) - answers.keys())
        asked = draws.some(list(answers), QUESTIONS)
        asked = [draws.pick(missing) if draws.chance(SHARE_UNANSWERED) else one for one in asked]
        return [_question(context, one, answers.get(one)) for one in dict.fromkeys(asked)]


def _question(context: str, asked: tuple[str, str, str], answer: tuple[str, int] | None) -> Row:
    kind, name, fact = asked
    question = KINDS[kind][fact][2].format(it=name)
    return {
        "id": hashlib.sha256(f"{context}\n{question}".encode()).hexdigest()[:16],
        "context": context,
        "question": question,
        "answers": {"text": [answer[0]] if answer else [], "answer_start": [answer[1]] if answer else []},
    }


def _names(kinds: Sequence[str], draws: Draws) -> list[str]:
    """One name for each, none twice."""
    names: dict[str, None] = {}
    for number, kind in enumerate(kinds, start=1):
        while len(names) < number:
            names[_name(kind, draws)] = None
    return list(names)


def _name(kind: str, draws: Draws) -> str:
    if kind == "ship":
        return "the " + " ".join(draws.pick(words) for words in SHIPS)
    if kind == "town":
        return draws.pick(BEGINNINGS) + draws.pick(TOWNS)
    return f"{draws.pick(WOMEN + MEN)} {draws.pick(BEGINNINGS)}{draws.pick(SURNAMES)}"


def _pronoun(kind: str, name: str) -> str:
    return "it" if kind != "person" else "she" if name.split()[0] in WOMEN else "he"


def _value(fact: str, draws: Draws) -> str:
    if fact == "birthday":
        return f"{draws.between(1, 28)} {draws.pick(MONTHS)}"
    if fact in ("founded", "built"):
        return str(draws.between(1120, 1790) if fact == "founded" else draws.between(1850, 1990))
    if fact in ("people", "length"):
        return f"{draws.between(11, 899) * 100:,}" if fact == "people" else f"{draws.between(18, 140)} metres"
    if fact in ("birthplace", "home", "port"):
        return _name("town", draws)
    if fact in ("friend", "mayor", "captain"):
        return _name("person", draws)
    if fact == "river":
        return draws.pick(BEGINNINGS) + draws.pick(RIVERS)
    if fact == "work":
        return with_article(draws.pick(WORK))
    return draws.pick({"music": INSTRUMENTS, "fame": FAME, "cargo": CARGO}[fact])
