"""The cache of encoded rows."""

import multiprocessing
import os
from pathlib import Path

import pytest
from datasets import Dataset

from niwaki.data import encode as module
from niwaki.data.encode import cache_folder, encode
from niwaki.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path))
    return tmp_path / "encoded"


class Lengths:
    """Encodes texts as their lengths, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        self.calls.append(len(batch["text"]))
        return {"input_ids": [[len(text)] for text in batch["text"]], "length": [1] * len(batch["text"])}


def texts(count: int = 2500) -> Dataset:
    return Dataset.from_dict({"text": ["x" * (i % 7) for i in range(count)]})


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    monkeypatch.setenv("NIWAKI_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("NIWAKI_CACHE")
    assert cache_folder() == Path("/shared/niwaki")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "niwaki"


def test_rows_are_encoded_once() -> None:
    function = Lengths()
    first = encode(texts(), function, "key")
    assert first.column_names == ["input_ids", "length"]
    assert first["input_ids"][:] == [[i % 7] for i in range(2500)]
    assert function.calls == [1000, 1000, 500]
    assert encode(texts(), function, "key")[:] == first[:]
    assert len(function.calls) == 3


def test_content_and_key_and_whole_tell_results_apart() -> None:
    function = Lengths()
    encode(texts(10), function, "key")
    encode(texts(10), function, "other key")
    encode(texts(11), function, "key")
    encode(texts(10), function, "key", whole=True)
    encode(texts(11).select(range(10)), function, "key")
    assert function.calls == [10, 10, 11, 10]


def test_whole_passes_all_rows_at_once() -> None:
    function = Lengths()
    encode(texts(2500), function, "key", whole=True)
    assert function.calls == [2500]


def test_the_number_of_rows_may_change() -> None:
    packed = encode(texts(10), lambda batch: {"input_ids": [[1, 2]] * 3}, "key", whole=True)
    assert packed.num_rows == 3


def test_a_column_may_be_empty_at_first() -> None:
    result = encode(texts(1001), lambda batch: {"a": [[] if len(batch["text"]) > 1 else [5]] * len(batch["text"])}, "k")
    assert result["a"][:] == [[]] * 1000 + [[5]]


def test_no_rows_are_refused(cache: Path) -> None:
    with pytest.raises(DataError, match="10 rows became none"):
        encode(texts(10), lambda batch: {"input_ids": []}, "key", whole=True)
    assert not list(cache.glob("*.arrow"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "no digest"])
def test_a_damaged_file_is_made_again(cache: Path, damage: str) -> None:
    function = Lengths()
    expected = encode(texts(100), function, "key")[:]
    [path] = cache.glob("*.arrow")
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.unlink()
    path.write_bytes({"truncate": content[:middle], "flip": flipped, "empty": b""}.get(damage, content))
    if damage == "no digest":
        path.with_suffix(".sha256").unlink()
    assert encode(texts(100), function, "key")[:] == expected
    assert len(function.calls) == 2
    assert path.read_bytes() == content


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    encode(texts(10), Lengths(), "key")
    [path] = cache.glob("*.arrow")
    path.unlink()
    stale = cache / f".{path.name}.abc"
    stale.write_text("half")
    encode(texts(10), Lengths(), "key")
    assert not stale.exists()


def test_a_failed_function_leaves_nothing(cache: Path) -> None:
    with pytest.raises(KeyError):
        encode(texts(10), lambda batch: {"a": batch["absent"]}, "key")
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_the_oldest_results_go_when_the_folder_is_full(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        encode(texts(100), Lengths(), f"key {number}")
        [new] = [path for path in cache.glob("*.arrow") if path.stat().st_mtime > 1000]
        os.utime(new, (number + 1, number + 1))
    size = new.stat().st_size
    monkeypatch.setattr(module, "LARGEST_CACHE", int(2.5 * size))
    function = Lengths()
    encode(texts(100), function, "key 3")
    assert len(list(cache.glob("*.arrow"))) == 2
    encode(texts(100), function, "key 2")
    assert len(function.calls) == 1
    encode(texts(100), function, "key 0")
    assert len(function.calls) == 2


def _encode_elsewhere(folder: str, answers: "multiprocessing.Queue") -> None:
    os.environ["NIWAKI_CACHE"] = folder
    function = Lengths()
    answers.put((len(function.calls), encode(texts(100), function, "key").num_rows, len(function.calls)))


def test_two_processes_encode_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_encode_elsewhere, args=(str(tmp_path), answers)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(results) == [(0, 100, 0), (0, 100, 1)]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cache folder .*file/encoded: cannot be used: .*NIWAKI_CACHE"):
        encode(texts(10), Lengths(), "key")
