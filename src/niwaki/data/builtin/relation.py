"""Sentences with two marked nouns and the relation between them, with the labels of SemEval-2010 task 8."""

import re
from dataclasses import dataclass
from itertools import combinations

from niwaki.data.builtin.generated import Draws, Generated, Row

OTHER = "Other"
# A pattern, and its relations: the name, then the two slots in the order that the name says. Of pairs after a dash it
# could be argued what they are: they are never marked.
PATTERNS = """
the {harm} in the {place} was caused by the {force}. | Cause-Effect force harm
the {force} caused {harm} in the {place}. | Cause-Effect force harm
the {force} led to {harm} while a {member} read a {message} on {subject}. | Cause-Effect force harm; Message-Topic message subject
a {message} about {subject} was lost in the {trouble} that the {force} caused. | Message-Topic message subject; Cause-Effect force trouble
with a {tool}, the {maker} made a {product} for the {place}. | Instrument-Agency tool maker; Product-Producer product maker; - product place
the {maker} used a {tool} to build a {product}. | Instrument-Agency tool maker; Product-Producer product maker
the {product} by the {maker} was made with a {tool}. | Product-Producer product maker; Instrument-Agency tool maker
a {tool} helped the {maker} to finish the {product}. | Instrument-Agency tool maker; Product-Producer product maker
the {holder} was full of {goods} from a {source}. | Content-Container goods holder; Entity-Origin goods source
the {goods} in the {holder} came from a {source}. | Content-Container goods holder; Entity-Origin goods source
from the {source} came {goods}, all packed in a {holder}. | Entity-Origin goods source; Content-Container goods holder; - source holder
the {maker} carried the {goods} from the {source} into the {place}. | Entity-Origin goods source; Entity-Destination goods place
the {place} received {goods} from a {source}. | Entity-Destination goods place; Entity-Origin goods source
a {holder} with {goods} was sent to the {place}. | Content-Container goods holder; Entity-Destination holder place; - goods place
the {maker} put the {goods} into a {holder} that stood by the {whole}. | Entity-Destination goods holder
the {part} of the {whole} was damaged by a {member}. | Component-Whole part whole
the {whole} with the broken {part} belongs to the {maker}. | Component-Whole part whole
the {whole} has a new {part}, which a {maker} made with a {tool}. | Component-Whole part whole; Product-Producer part maker; Instrument-Agency tool maker
a {member} of the {band} wrote a {message} about {subject}. | Member-Collection member band; Product-Producer message member; Message-Topic message subject; - band message
the {band}, with a {member} among them, walked to the {place}. | Member-Collection member band; Entity-Destination band place; - member place
the {band} has lost a {member} since the {force}. | Member-Collection member band
it was about {subject} that a {member} wrote the {message}. | Message-Topic message subject; Product-Producer message member
on {subject} there was only a {message} in the {holder}. | Message-Topic message subject; Content-Container message holder
""".strip().splitlines()  # noqa: E501
WORDS = {
    "force": "storm flood earthquake fire drought explosion frost".split(),
    "harm": "panic damage confusion delays losses chaos".split(),
    "trouble": "panic chaos confusion turmoil".split(),
    "place": "valley school museum harbour kitchen village garden hospital".split(),
    "message": "report letter book leaflet diary poem novel pamphlet".split(),
    "subject": "volcanoes justice taxes whales democracy football astronomy nutrition".split(),
    "tool": "chisel hammer lathe saw drill knife".split(),
    "maker": "carpenter joiner craftsman volunteer prisoner pensioner".split(),
    "product": "table cradle wardrobe shelf bench ladder".split(),
    "goods": "candles bottles blankets toys brushes ropes pots lamps".split(),
    "holder": "box basket chest sack drawer crate".split(),
    "source": "factory monastery workshop warehouse market prison".split(),
    "part": "handle roof door wheel mirror lock".split(),
    "whole": "car carriage caravan tractor van wagon".split(),
    "member": "sailor singer student soldier dancer clerk".split(),
    "band": "crew choir club troupe committee delegation".split(),
}


@dataclass(frozen=True, kw_only=True)
class MarkedRelations(Generated):
    """`text` with <e1>..</e1> before <e2>..</e2>; `label`: "Cause-Effect(e1,e2)" and so on, or Other.

    Every sentence comes twice with the marks at other nouns and another label, both in one split.
    """

    def draw(self, draws: Draws) -> list[Row]:
        pattern, found = draws.pick(PATTERNS).split(" | ")
        slots = re.findall(r"\{(\w+)\}", pattern)
        words = {slot: draws.pick(WORDS[slot]) for slot in slots}
        labels = dict.fromkeys(combinations(slots, 2), OTHER)
        for name, first, second in (relation.split() for relation in found.split("; ")):
            if name == "-":
                labels = {pair: label for pair, label in labels.items() if set(pair) != {first, second}}
                continue
            in_order = (first, second) in labels
            labels[(first, second) if in_order else (second, first)] = f"{name}({'e1,e2' if in_order else 'e2,e1'})"
        one = draws.pick([pair for pair, label in labels.items() if label != OTHER])
        other = draws.pick([pair for pair, label in labels.items() if label != labels[one]])
        return [{"text": _marked(pattern, words, pair), "label": labels[pair]} for pair in draws.shuffled([one, other])]

    def identity(self, row: Row) -> str:
        return re.sub(r"</?e[12]>", "", row["text"])


def _marked(pattern: str, words: dict[str, str], pair: tuple[str, str]) -> str:
    marked = {slot: f"<{mark}>{words[slot]}</{mark}>" for mark, slot in zip(("e1", "e2"), pair, strict=True)}
    text = pattern.format(**words | marked)
    return re.sub(r"^(<e1>)?\w", lambda found: found[0][:-1] + found[0][-1].upper(), text)
