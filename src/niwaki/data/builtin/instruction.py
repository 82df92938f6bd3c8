"""Instructions to change or examine a few words, each with one right answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.english import in_words
from niwaki.data.builtin.generated import Draws, Generated, Row

WORDS = """apple river stone garden lamp bird winter music bridge cloud paper silver mountain bread window horse letter
    island pepper rabbit candle forest button engine""".split()
Answer = Callable[[list[str]], str]
# What may be asked of a list of words, in two ways; {words} are the words. First those that answer with words.
CHANGES: tuple[tuple[tuple[str, str], Answer], ...] = (
    (("Sort these words by the alphabet: {words}.", "Put {words} into alphabetical order."),
     lambda words: ", ".join(sorted(words))),
    (("Write these words in the opposite order: {words}.", "Reverse the order of {words}."),
     lambda words: ", ".join(reversed(words))),
    (("Spell each of these words backwards: {words}.", "Turn round the letters of each word: {words}."),
     lambda words: ", ".join(word[::-1] for word in words)),
    (("Write these words in capital letters: {words}.", "Put {words} into upper case."),
     lambda words: ", ".join(words).upper()),
    (("Leave out the first of these words: {words}.", "Write {words} without the first word."),
     lambda words: ", ".join(words[1:])),
)  # fmt: skip
QUESTIONS: tuple[tuple[tuple[str, str], Answer], ...] = (
    (("How many words are these: {words}?", "Count these words: {words}."), lambda words: in_words(len(words))),
    (("Which of these words is the last one: {words}?", "Name the last word of {words}."), lambda words: words[-1]),
    (("Which of these words comes first in the alphabet: {words}?", "Pick the one that comes first in the alphabet: {words}."), min),
    (("What are the first letters of these words: {words}?", "Give the first letter of each word: {words}."),
     lambda words: ", ".join(word[0] for word in words)),
    (("How many letters has the first of these words: {words}?", "Count the letters of the first word: {words}."),
     lambda words: in_words(len(words[0]))),
)  # fmt: skip
# A second turn works on the answer to the first.
FOLLOW_UPS: tuple[tuple[str, Answer], ...] = (
    ("Now only the first of them.", lambda words: words[0]),
    ("Now only the last of them.", lambda words: words[-1]),
    ("Now leave out the last one.", lambda words: ", ".join(words[:-1])),
    ("And how many are these?", lambda words: in_words(len(words))),
    ("Now in the opposite order.", lambda words: ", ".join(reversed(words))),
)
# What a system message asks for, and what that makes of every answer.
SYSTEMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("You answer in as few words as possible.", lambda answer: answer),
    ("Put every answer between double quotes.", lambda answer: f'"{answer}"'),
    ("End every answer with a full stop.", lambda answer: f"{answer}."),
    ("Begin every answer with the word Answer and a colon.", lambda answer: f"Answer: {answer}"),
)


@dataclass(frozen=True, kw_only=True)
class WordTasks(Generated):
    """`messages`: a user who asks for something about a few words and an assistant who is right; in some a system message
    first, which says how to answer, and in some a second turn on the answer to the first."""

    apart: ClassVar[tuple[str, ...]] = ("messages",)

    def draw(self, draws: Draws) -> list[Row]:
        system, answered = draws.pick(SYSTEMS) if draws.chance(0.4) else ("", str)
        words = draws.some(WORDS, draws.between(3, 5))
        patterns, answer = draws.pick(CHANGES + QUESTIONS)
        turns = [(draws.pick(patterns).format(words=", ".join(words)), answer(words))]
        if (patterns, answer) in CHANGES and draws.chance(0.5):
            question, following = draws.pick(FOLLOW_UPS)
            turns.append((question, following(turns[0][1].split(", "))))
        messages = [{"role": "system", "content": system}] if system else []
        for asked, said in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered(said)}]
        return [{"messages": messages}]
