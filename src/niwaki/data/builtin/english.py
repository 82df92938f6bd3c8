"""A little English for what is generated: articles, lists, numbers in words, names."""

from collections.abc import Sequence

WOMEN = "Anna Clara Emma Grace Ines Julia Laura Maria Nora Olivia Rosa Sophie Tess Vera".split()
MEN = "Adam Ben Carl David Erik Felix Hugo Ivan Jonas Leo Martin Oscar Paul Simon".split()
PEOPLE = WOMEN + MEN
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def with_article(noun: str) -> str:
    """The noun with a or an, by its first letter."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def listed(items: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(part for part in (", ".join(items[:-1]), items[-1]) if part)


def in_words(number: int) -> str:
    """A whole number from 0 to 999,999 as it is written out in British English."""
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{SMALL[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    high, low = divmod(number, size)
    link = " and " if low < 100 else " "
    return f"{in_words(high)} {name}" + (f"{link}{in_words(low)}" if low else "")
