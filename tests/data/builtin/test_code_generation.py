"""Problems on lists: the solutions pass the tests, wrong ones do not, and the examples are true."""

import doctest
from collections import Counter
from typing import Any

import pytest
from builtin_rows import check_generated, rows_of, splits_of

from niwaki.data.builtin.code_generation import ListProblems


def passes(row: dict[str, Any], solution: str) -> bool:
    """Whether prompt, body and tests run to the end, as HumanEval runs them."""
    names: dict[str, Any] = {}
    exec(f"{row['prompt']}{solution}\n{row['tests']}", names)
    try:
        names["check"](names[row["entry_point"]])
    except AssertionError:
        return False
    except Exception:  # whatever a wrong body does
        return False
    return True


def test_the_rows_are_as_promised() -> None:
    columns = {"id", "prompt", "solution", "tests", "entry_point"}
    check_generated(ListProblems(), columns, "13d9ec344f07", given=lambda row: row["entry_point"])
    first = splits_of(ListProblems())["train"][0]
    assert first["solution"] == '    return min((x.upper() for x in words if "a" in x), default="")\n'
    assert first["id"] == "lists/first_of_uppercased_with_a"


def test_every_solution_passes_and_every_example_is_true() -> None:
    for row in rows_of(ListProblems()):
        assert passes(row, row["solution"]), row["id"]
        names: dict[str, Any] = {}
        exec(row["prompt"] + row["solution"], names)
        case = doctest.DocTestParser().get_doctest(names[row["entry_point"]].__doc__, names, row["id"], None, 0)
        assert len(case.examples) == 2
        assert doctest.DocTestRunner(verbose=False).run(case).failed == 0


@pytest.mark.parametrize("body", ["pass", "return []", "return 0", 'return ""', "return list(*locals().values())"])
def test_a_fixed_body_passes_no_problem(body: str) -> None:
    """pass@1 of a fixed answer, or of the list as it is: 0."""
    assert not [row["id"] for row in rows_of(ListProblems()) if passes(row, f"    {body}\n")]


def test_leaving_out_a_step_fails() -> None:
    rows = rows_of(ListProblems())
    without = [(row, row["solution"].split(" if ")[0] + closing(row["solution"])) for row in rows]
    assert sum(passes(row, body) for row, body in without) == 0
    doubled = [row for row in rows if "2 * x" in row["solution"]]
    assert len(doubled) > 20
    assert not [row for row in doubled if passes(row, row["solution"].replace("2 * x", "x"))]
    above = [row for row in rows if "above_" in row["entry_point"] and "sum" in row["entry_point"]]
    assert above
    assert not [row for row in above if passes(row, row["solution"].replace(" > ", " < "))]


def closing(solution: str) -> str:
    """The end of a body behind its condition."""
    return next(end for end in (", default=0)\n", ', default="")\n', "]\n", ")\n") if solution.endswith(end)).replace(
        ", default", "), default"
    )


def test_problems_are_of_many_kinds() -> None:
    """A body known by heart from train is right for few of the test problems."""
    splits = splits_of(ListProblems())
    known = {row["solution"] for row in splits["train"]}
    assert not [row for row in splits["test"] if row["solution"] in known]
    ends = Counter(row["prompt"].split("->")[1].split(":")[0].strip() for row in splits["test"])
    assert set(ends) == {"List[int]", "List[str]", "int", "str"}
