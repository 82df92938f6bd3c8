"""Short notes on none to three topics."""

from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.english import DAYS, PEOPLE
from niwaki.data.builtin.generated import Draws, Generated, Row

TOPICS = {
    "food": [
        "the {dish} that {who} cooked was {taste}",
        "we are out of {grocery}, so I will go to the shop on {day}",
        "{who} wants the recipe for the {dish}",
        "please put {grocery} and {grocery2} on the shopping list",
        "the {dish} needs more {grocery}",
    ],
    "travel": [
        "our {vehicle} to {town} leaves at {hour}",
        "{who} has booked a room in {town} for {number} nights",
        "the {vehicle} from {town} was {number} hours late",
        "{who} left a suitcase on the {vehicle} to {town}",
        "I need a new passport before we go to {town}",
    ],
    "health": [
        "{who} has had a {illness} since {day}",
        "the doctor says that the {illness} will soon be gone",
        "take these pills {number} times a day",
        "{who} sees the dentist on {day}",
        "my {part} still hurts after the fall",
    ],
    "money": [
        "the {bill} bill of {number} hundred euros is not paid yet",
        "{who} asked the bank for a loan",
        "I owe {who} {number} euros",
        "the rent goes up by {number} percent",
        "{who} wants to save {number} hundred euros a month",
    ],
    "weather": [
        "it has been {sky} since {day}",
        "they expect {fall} on {day}",
        "after {number} days of {fall} the sun came out",
        "it was too windy to sit outside",
        "the night will be {sky}, with some {fall} towards the morning",
    ],
    "sport": [
        "{who} scored {number} goals on {day}",
        "the {game} match on {day} ended in a draw",
        "{who} runs {number} kilometres before breakfast",
        "our {game} team has a new coach",
        "{who} swam {number} lengths of the pool",
    ],
    "music": [
        "{who} practises the {instrument} every {day}",
        "the concert on {day} begins at {hour}",
        "the choir is learning {number} new songs",
        "{who} sang while {other} played the {instrument}",
        "there is a new {instrument} in the rehearsal room",
    ],
    "pets": [
        "{who} has to take the {pet} to the vet on {day}",
        "our {pet} slept under the sofa again",
        "please feed the {pet} while we are out",
        "the {pet} is {number} years old now",
        "{who} lets the {pet} into the garden at {hour}",
    ],
}
NEUTRAL = [
    "please call {who} back on {day}",
    "{who} will be here at {hour}",
    "the meeting with {who} is now on {day}",
    "I have put the keys on the table",
    "{who} sends you all the best",
    "tell {who} that I will be {number} minutes late",
    "the red folder belongs to {who}",
    "do not forget the letter for {who}",
    "{other} and {who} met in the hall at {hour}",
]
WORDS = {
    "who": PEOPLE[::2],
    "other": PEOPLE[1::2],
    "day": DAYS,
    "hour": "six seven eight nine ten eleven".split(),
    "number": "two three four five six seven eight nine".split(),
    "dish": ["lentil soup", "fish pie", "apple cake", "curry", "vegetable stew", "pizza"],
    "taste": ["delicious", "far too salty", "a little bland", "very spicy"],
    "grocery": ["flour", "butter", "rice", "garlic"],
    "grocery2": ["onions", "milk", "cheese", "pepper"],
    "vehicle": ["train", "bus", "ferry", "flight"],
    "town": ["Lisbon", "Oslo", "Vienna", "Athens", "Dublin", "Prague"],
    "illness": ["fever", "cold", "cough", "sore throat", "headache"],
    "part": ["knee", "shoulder", "ankle", "back", "wrist"],
    "bill": ["electricity", "gas", "water", "telephone"],
    "sky": ["cold and clear", "warm and dry", "grey and foggy", "cloudy and mild"],
    "fall": ["rain", "snow", "hail", "drizzle"],
    "game": ["football", "tennis", "hockey", "volleyball"],
    "instrument": ["violin", "piano", "trumpet", "flute", "cello"],
    "pet": ["cat", "dog", "rabbit", "parrot", "hamster"],
}
COUNTS = (0, 1, 1, 1, 2, 2, 2, 3)  # how many topics a note has, each as likely


@dataclass(frozen=True, kw_only=True)
class TopicNotes(Generated):
    """Notes of one to four sentences (`text`), each sentence on one topic or on none; `labels`: the topics, sorted."""

    apart: ClassVar[tuple[str, ...]] = ("text",)

    def draw(self, draws: Draws) -> list[Row]:
        topics = draws.some(list(TOPICS), draws.pick(COUNTS))
        patterns = [draws.pick(TOPICS[topic]) for topic in topics]
        patterns += draws.some(NEUTRAL, draws.between(0, 1) if topics else draws.between(1, 2))
        sentences = [draws.fill(pattern, WORDS) + "." for pattern in draws.shuffled(patterns)]
        return [{"text": " ".join(sentences), "labels": sorted(topics)}]
