import pytest

from niwaki.errors import nearest


@pytest.mark.parametrize(
    ("name", "known", "cutoff", "found"),
    [
        ("tunnig", ["task", "tuning"], 0.0, "tuning"),
        ("xyz", ["task"], 0.0, "task"),
        ("xyz", ["task"], 0.5, ""),
        ("x", [], 0.0, ""),
    ],
)
def test_nearest(name, known, cutoff, found):
    assert nearest(name, known, cutoff=cutoff) == found
