"""Pairs of sentences on an event, as similar as the facts they share."""

from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.generated import Draws, Generated, Row

# Each line is one fact, in several wordings.
WHO = """a doctor | a physician
a lawyer | an attorney
a police officer | a policewoman
a schoolchild | a young pupil
a professor | a university teacher
a flight attendant | a member of the cabin crew
a farmer | a man who runs a farm
a nurse | a hospital nurse""".splitlines()
DID = """bought | purchased
repaired | mended | fixed
lost | mislaid
found | discovered
photographed | took a picture of
sold | found a buyer for
stole | made off with""".splitlines()
WHAT = """a bicycle | a bike
a mobile phone | a cell phone
a violin | a fiddle
a handbag | a purse
an old car | an old automobile
a sofa | a couch
a wristwatch | a watch
a raincoat | a rain jacket""".splitlines()
WHERE = """at the railway station | at the train station
by the sea | on the coast
in the city centre | downtown
in a village | in the countryside
near the school | close to the schoolhouse
in front of the church | outside the chapel
at the market | among the stalls""".splitlines()
WHEN = """at dawn | when the sun came up
at noon | in the middle of the day
at midnight | at twelve o'clock at night
in the autumn | in the fall
two weeks ago | a fortnight ago
on Christmas Day | on the twenty-fifth of December
ten years ago | a decade ago""".splitlines()
FACTS = [[line.split(" | ") for line in lines] for lines in (WHO, DID, WHAT, WHERE, WHEN)]


@dataclass(frozen=True, kw_only=True)
class FactPairs(Generated):
    """`text` and `text_pair` each tell who did what to which thing, where and when, in wordings and an order of their
    own; `label`: how many of these five facts are the same, from 0.0 to 5.0, each as likely."""

    apart: ClassVar[tuple[str, ...]] = ("text", "text_pair")

    def draw(self, draws: Draws) -> list[Row]:
        shared = draws.between(0, len(FACTS))
        same = set(draws.some(range(len(FACTS)), shared))
        first, second = [], []
        for place, wordings in enumerate(FACTS):
            fact, other = draws.some(wordings, 2)
            first.append(draws.pick(fact))
            # A fact that is shared is worded anew, mostly in other words.
            reworded = [words for words in fact if words != first[-1]] if draws.chance(0.8) else fact
            second.append(draws.pick(reworded if place in same else other))
        return [{"text": _told(first, draws), "text_pair": _told(second, draws), "label": float(shared)}]


def _told(facts: list[str], draws: Draws) -> str:
    who, did, what, where, when = facts
    patterns = [
        f"{who} {did} {what} {where} {when}.",
        f"{when}, {who} {did} {what} {where}.",
        f"{where}, {who} {did} {what} {when}.",
        f"it was {when} that {who} {did} {what} {where}.",
    ]
    text = draws.pick(patterns)
    return text[0].upper() + text[1:]
