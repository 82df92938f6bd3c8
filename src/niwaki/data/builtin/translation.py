"""English numbers, dates, times, prices and counted things, all in words, and the German for them."""

import calendar
from dataclasses import dataclass
from typing import ClassVar

from niwaki.data.builtin.english import DAYS, MONTHS, in_words
from niwaki.data.builtin.generated import Draws, Generated, Row

GERMAN_SMALL = """null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn
    siebzehn achtzehn neunzehn""".split()
GERMAN_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
GERMAN_DAYS = "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split()
GERMAN_MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
ORDINALS = {1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth", 12: "twelfth"}
GERMAN_ORDINALS = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}
NOUNS = {
    "apples": "Äpfel", "books": "Bücher", "flowers": "Blumen", "tables": "Tische", "doors": "Türen", "houses": "Häuser",
    "trees": "Bäume", "chairs": "Stühle", "birds": "Vögel", "letters": "Briefe", "shirts": "Hemden", "cars": "Autos",
}  # fmt: skip
ADJECTIVES = {
    "small": "kleine", "big": "große", "old": "alte", "new": "neue", "beautiful": "schöne", "white": "weiße",
    "red": "rote", "green": "grüne",
}  # fmt: skip
PARTS_OF_DAY = {"in the morning": "morgens", "in the afternoon": "nachmittags", "in the evening": "abends"}
HOURS = {"in the morning": (5, 10), "in the afternoon": (2, 5), "in the evening": (6, 10)}


@dataclass(frozen=True, kw_only=True)
class EnglishGerman(Generated):
    """`source` in English, `target` in German: numbers up to 999,999, dates with and without the day of the week,
    times of the day, prices, counted things."""

    apart: ClassVar[tuple[str, ...]] = ("source",)

    def draw(self, draws: Draws) -> list[Row]:
        source, target = draws.pick((_number, _number, _date, _date, _time, _price, _things))(draws)
        return [{"source": source, "target": target}]


def german(number: int, *, joined: bool = False) -> str:
    """A whole number from 0 to 999,999 as German writes it: one word. Where it is `joined` to another, 1 is ein."""
    if number < 100:
        tens, ones = divmod(number, 10)
        if number < 20:
            return GERMAN_SMALL[number] + ("s" if number == 1 and not joined else "")
        return (f"{GERMAN_SMALL[ones]}und" if ones else "") + GERMAN_TENS[tens]
    size, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    high, low = divmod(number, size)
    return german(high, joined=True) + name + (german(low, joined=joined) if low else "")


def _number(draws: Draws) -> tuple[str, str]:
    number = draws.between(0, 10 ** draws.between(2, 6) - 1)
    return in_words(number), german(number)


def _date(draws: Draws) -> tuple[str, str]:
    year, month = draws.between(1900, 2029), draws.between(1, 12)
    day = draws.between(1, calendar.monthrange(year, month)[1])
    weekday = calendar.weekday(year, month, day)
    name, german_name = MONTHS[month - 1], GERMAN_MONTHS[month - 1]
    plain = f"the {_ordinal(day)} of {name} {_year(year)}"
    rest = f"{german_name} {_german_year(year)}"
    if draws.chance(0.3):
        return plain, f"der {_german_ordinal(day)}e {rest}"
    if draws.chance(0.5):
        return f"on {plain}", f"am {_german_ordinal(day)}en {rest}"
    return f"on {DAYS[weekday]}, {plain}", f"am {GERMAN_DAYS[weekday]}, dem {_german_ordinal(day)}en {rest}"


def _ordinal(day: int) -> str:
    tens, ones = divmod(day, 10) if day > 20 else (0, day)
    if tens and not ones:
        return {2: "twentieth", 3: "thirtieth"}[tens]
    last = ORDINALS.get(ones) or ("twentieth" if ones == 20 else f"{in_words(ones)}th")
    return (f"{in_words(10 * tens)}-" if tens else "") + last


def _german_ordinal(day: int) -> str:
    return GERMAN_ORDINALS.get(day) or german(day) + ("t" if day < 20 else "st")


def _year(year: int) -> str:
    high, low = divmod(year, 100)
    if 2000 <= year < 2010:
        return in_words(year)
    if low == 0:
        return f"{in_words(high)} hundred"
    return f"{in_words(high)} {'oh ' if low < 10 else ''}{in_words(low)}"


def _german_year(year: int) -> str:
    high, low = divmod(year, 100)
    return german(year) if year >= 2000 else f"{german(high)}hundert{german(low) if low else ''}"


def _time(draws: Draws) -> tuple[str, str]:
    part = draws.pick(list(PARTS_OF_DAY))
    hour, minutes = draws.between(*HOURS[part]), 5 * draws.between(0, 11)
    next_hour = hour + 1
    english_minutes = {15: "a quarter", 30: "half"}
    if minutes == 0:
        english, target = f"{in_words(hour)} o'clock", f"{german(hour)} Uhr"
    elif minutes <= 30:
        english = f"{english_minutes.get(minutes) or in_words(minutes)} past {in_words(hour)}"
        before = {15: f"Viertel nach {german(hour)}", 25: f"fünf vor halb {german(next_hour)}",
                  30: f"halb {german(next_hour)}"}  # fmt: skip
        target = before.get(minutes) or f"{german(minutes)} nach {german(hour)}"
    else:
        left = 60 - minutes
        english = f"{english_minutes.get(left) or in_words(left)} to {in_words(next_hour)}"
        after = {15: f"Viertel vor {german(next_hour)}", 25: f"fünf nach halb {german(next_hour)}"}
        target = after.get(left) or f"{german(left)} vor {german(next_hour)}"
    weekday = draws.between(0, 6)
    when, german_when = draws.pick(
        (("", ""), (f" on {DAYS[weekday]}", f"am {GERMAN_DAYS[weekday]} "), (" every day", "jeden Tag "))
    )
    return f"at {english} {part}{when}", f"{german_when}um {target} {PARTS_OF_DAY[part]}"


def _price(draws: Draws) -> tuple[str, str]:
    euros, cents = draws.between(1, 99), draws.between(0, 99)
    english, target = f"{in_words(euros)} {'euro' if euros == 1 else 'euros'}", f"{german(euros, joined=True)} Euro"
    if cents:
        english += f" and {in_words(cents)} {'cent' if cents == 1 else 'cents'}"
        target += f" und {german(cents, joined=True)} Cent"
    return english, target


def _things(draws: Draws) -> tuple[str, str]:
    number, noun, adjective = draws.between(2, 99), draws.pick(list(NOUNS)), draws.pick(list(ADJECTIVES))
    return f"{in_words(number)} {adjective} {noun}", f"{german(number)} {ADJECTIVES[adjective]} {NOUNS[noun]}"
