"""Small problems on lists of numbers and of words, posed as HumanEval does, with tests that can be run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from niwaki.data.builtin.generated import Draws, Generated, Row


@dataclass(frozen=True)
class Step:
    """What a solution does to a list: in the name of the function, in its docstring and in its body.

    `does` does the same, apart from the text of the body; it gives the answers that the tests ask for.
    """

    name: str
    words: str
    code: str
    does: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Problems on one kind of list: which elements are kept, what becomes of each, what of them all.

    `sizes`: the least and the greatest {size} that a step may name.
    """

    argument: str
    annotation: str
    kept: Sequence[Step]
    changed: Sequence[Step]
    gathered: Sequence[tuple[str, Step]]  # with the type of the answer
    sizes: tuple[int, int]
    elements: Sequence[Any]


NUMBERS = Kind(
    argument="numbers",
    annotation="List[int]",
    kept=(
        Step("evens", "the even numbers", "x % 2 == 0", lambda x, size: x % 2 == 0),
        Step("odds", "the odd numbers", "x % 2 == 1", lambda x, size: x % 2 == 1),
        Step("positives", "the numbers above zero", "x > 0", lambda x, size: x > 0),
        Step("negatives", "the numbers below zero", "x < 0", lambda x, size: x < 0),
        Step("above_{size}", "the numbers greater than {size}", "x > {size}", lambda x, size: x > size),
        Step("below_{size}", "the numbers less than {size}", "x < {size}", lambda x, size: x < size),
        Step("multiples_of_{size}", "the multiples of {size}", "x % {size} == 0", lambda x, size: x % size == 0),
    ),
    changed=(
        Step("", "", "x", lambda x: x),
        Step("doubled_", ", each doubled", "2 * x", lambda x: 2 * x),
        Step("squared_", ", each squared", "x * x", lambda x: x**2),
        Step("negated_", ", each with its sign changed", "-x", lambda x: -x),
        Step("increased_", ", each increased by one", "x + 1", lambda x: x + 1),
    ),
    gathered=(
        ("List[int]", Step("list_of", "a list of", "[{each}]", list)),
        ("List[int]", Step("sorted", "a sorted list of", "sorted({each})", sorted)),
        ("int", Step("sum_of", "the sum of", "sum({each})", sum)),
        ("int", Step("largest_of", "the largest (0 if there is none) of", "max(({each}), default=0)",
                     lambda found: max(found) if found else 0)),
        ("int", Step("smallest_of", "the smallest (0 if there is none) of", "min(({each}), default=0)",
                     lambda found: min(found) if found else 0)),
    ),
    sizes=(3, 9),
    elements=range(-12, 31),
)  # fmt: skip
WORDS = Kind(
    argument="words",
    annotation="List[str]",
    kept=(
        Step("longer_than_{size}", "the words of more than {size} letters", "len(x) > {size}",
             lambda x, size: len(x) > size),
        Step("shorter_than_{size}", "the words of fewer than {size} letters", "len(x) < {size}",
             lambda x, size: len(x) < size),
        Step("of_length_{size}", "the words of exactly {size} letters", "len(x) == {size}",
             lambda x, size: len(x) == size),
        Step("with_a", "the words that contain the letter a", '"a" in x', lambda x, size: "a" in x),
        Step("with_e", "the words that contain the letter e", '"e" in x', lambda x, size: "e" in x),
        Step("plurals", "the words that end in s", 'x.endswith("s")', lambda x, size: x[-1] == "s"),
        Step("palindromes", "the words that read the same backwards", "x == x[::-1]",
             lambda x, size: list(x) == list(reversed(x))),
    ),
    changed=(
        Step("", "", "x", lambda x: x),
        Step("uppercased_", ", each in capital letters", "x.upper()", str.upper),
        Step("reversed_", ", each spelled backwards", "x[::-1]", lambda x: "".join(reversed(x))),
        Step("capitalized_", ", each with a capital first letter", "x.capitalize()", str.capitalize),
    ),
    gathered=(
        ("List[str]", Step("list_of", "a list of", "[{each}]", list)),
        ("List[str]", Step("sorted", "a sorted list of", "sorted({each})", sorted)),
        ("str", Step("joined", "a string with single spaces between", '" ".join({each})', " ".join)),
        ("str", Step("first_of", "the first in the alphabet ('' if there is none) of", 'min(({each}), default="")',
                     lambda found: min(found) if found else "")),
    ),
    sizes=(3, 6),
    elements="level apples tree banana kayak sea houses noon book eye pens stars radar map lemon ideas bees civic".split(),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ListProblems(Generated):
    """`prompt`: a signature and a docstring with two examples; `solution`: the body; `tests`: a `check(candidate)`
    with five assertions; `entry_point`: the name of the function; `id`: that name with lists/ before it."""

    rows: int = 500

    apart: ClassVar[tuple[str, ...]] = ("entry_point",)

    def draw(self, draws: Draws) -> list[Row]:
        kind = draws.pick((NUMBERS, NUMBERS, WORDS))
        size = draws.between(*kind.sizes)
        kept, changed = draws.pick(kind.kept), draws.pick(kind.changed)
        answer, gathered = draws.pick(kind.gathered)
        name = f"{gathered.name}_{changed.name}{kept.name}".format(size=size)
        each = f"{changed.code} for x in {kind.argument} if {kept.code.format(size=size)}"

        cases = [[], *([draws.pick(kind.elements) for _ in range(draws.between(6, 9))] for _ in range(6))]
        answers = [gathered.does([changed.does(x) for x in case if kept.does(x, size)]) for case in cases]
        examples = [
            f"    >>> {name}({case})\n    {found!r}\n" for case, found in zip(cases[5:], answers[5:], strict=True)
        ]
        asserts = [
            f"    assert candidate({case}) == {found!r}\n" for case, found in zip(cases[:5], answers, strict=False)
        ]
        asked = f"Return {gathered.words} {kept.words}{changed.words}.".format(size=size)
        return [
            {
                "id": f"lists/{name}",
                "prompt": f"from typing import List\n\n\ndef {name}({kind.argument}: {kind.annotation}) -> {answer}:\n"
                f'    """{asked}\n\n' + "".join(examples) + '    """\n',
                "solution": f"    return {gathered.code.format(each=each)}\n",
                "tests": "def check(candidate):\n" + "".join(asserts),
                "entry_point": name,
            }
        ]
