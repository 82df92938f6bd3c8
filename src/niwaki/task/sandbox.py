"""Generated Python runs in a process of its own that can do nothing else (the sandbox of Chen et al. 2021,
arXiv:2107.03374, section 2.3, here by what Linux offers without root; see `sandboxed.py`)."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path

from niwaki.errors import ConfigError
from niwaki.task.sandboxed import FAILED, LOADED, PASSED, READY, REFUSED, TESTED

MIB = 2**20
START = 60.0  # seconds until the interpreter runs, at most
GRACE = 5.0  # seconds to end what was started, at most
LOOK = 0.02  # seconds between two looks at the folder
LONGEST = 4096  # bytes of a report
CHILD = Path(__file__).with_name("sandboxed.py")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`seconds` of a run, `memory` in MiB, `disk` in MiB of all that it writes."""

    seconds: float = 5.0
    memory: int = 512
    disk: int = 8
    files: int = 32  # open at once


@dataclass(frozen=True)
class Outcome:
    """Whether the tests ran to their end, and why not."""

    passed: bool
    reason: str = ""


class NoSandbox(ConfigError):
    """This machine cannot isolate a process."""


def run(solution: str, tests: str, limits: Limits | None = None, *, isolated: bool = True) -> Outcome:
    """Run a solution and then, in the same names, its tests.

    The process gets the tests once it says that the solution is loaded, and once it says that they ran a random number,
    which it has to say back. Code that ends, loops, or writes what it likes has not passed; but both run in one
    process, so that a solution that is written against these tests or this sandbox, and acts when they run, can pass
    for right, and nothing here can rule that out. `isolated=False` gives up neither files nor
    network: seconds and disk (below the folder in which it starts) then hold for all processes that it starts, on Linux
    also those of other sessions, which end with it; memory, processor and open files for each of them alone. Code that
    ends the process that keeps track of them escapes that.

    Raises:
        NoSandbox: the kernel refuses to isolate the process, or it ended before it was ready to run anything.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16).encode()
    answers = {READY + LOADED: framed(tests), READY + LOADED + TESTED: token}
    job = {
        "solution": solution, "isolated": isolated, "memory": limits.memory * MIB,
        "seconds": int(limits.seconds) + 2, "file": min(1, limits.disk) * MIB, "files": limits.files,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="niwaki-", ignore_cleanup_errors=True) as folder, pipes() as (report, told):
        os.set_blocking(told[1].fileno(), False)
        with started(Path(folder), report[1].fileno(), told[0].fileno(), isolated=isolated) as child:
            report[1].close()
            told[0].close()
            assert child.stdin is not None
            with suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(job).encode())
            said, reason = listen(child, report[0].fileno(), told[1].fileno(), answers, Path(folder), limits)
        code = child.returncode
    if said == READY + LOADED + TESTED + PASSED + token and not reason:
        return Outcome(True)
    if not reason and code is not None and code < 0:
        reason = f"ended by {signal.Signals(-code).name}"
    if not said.startswith(READY):
        why = said[1:].decode(errors="replace") if said.startswith(REFUSED) else reason or f"ended with {code}"
        raise NoSandbox(refusal(why, limits, isolated=isolated))
    failed = said.removeprefix(READY).removeprefix(LOADED)
    if not reason and failed.startswith(FAILED):
        reason = failed[1:].decode(errors="replace")
    return Outcome(False, reason or "ended before its tests were through")


def refusal(why: str, limits: Limits, *, isolated: bool) -> str:
    """What is told where nothing can be run."""
    given = f"task.memory={limits.memory} MiB and task.timeout={limits.seconds:g} s"
    if isolated:
        return (
            f"task.unsafe=false: this machine cannot isolate a process with {given} ({why}), so no generated code is "
            "run; needs Linux 5.13 or later on x86_64 or aarch64, or task.unsafe=true"
        )
    return f"task.unsafe=true: this machine cannot run a process with {given} ({why}); needs more of one or the other"


def framed(text: str) -> bytes:
    """A text behind how many bytes it has."""
    data = text.encode(errors="surrogatepass")
    return len(data).to_bytes(8, "little") + data


@contextmanager
def pipes() -> Iterator[tuple[list[FileIO], list[FileIO]]]:
    """Two pipes (to read, to write). As files, which close once: a number may be another thread's by then."""
    with ExitStack() as ends:
        found = [
            [ends.enter_context(FileIO(end, mode)) for end, mode in zip(os.pipe(), "rw", strict=True)] for _ in "12"
        ]
        yield found[0], found[1]


@contextmanager
def started(folder: Path, report: int, told: int, *, isolated: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a session of its own; at last it is killed, with whatever it started."""
    # Not -I, which would not let the seed of hashes be set: the order of a set is the same in each run.
    flags = ["-S", "-s", "-P", "-B", "-X", "utf8"]
    child = subprocess.Popen(
        [sys.executable, *flags, str(CHILD), str(report), str(told)], cwd=folder, stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(report, told), start_new_session=True,
        env={"PYTHONHASHSEED": "0", "HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield child
    finally:
        if not isolated:  # it may have started others, which it ends before it ends itself
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def listen(
    child: subprocess.Popen[bytes], report: int, told: int, answers: Mapping[bytes, bytes], folder: Path, limits: Limits
) -> tuple[bytes, str]:
    """What the process says, and why it was stopped, where it was: it took too long, or wrote too much. `answers`: what
    it is told once it has said something."""
    said, due, begin, ready = b"", b"", time.monotonic(), False
    while len(said) <= LONGEST:
        ended = child.poll() is not None  # before the look, which then sees the last that it said
        heard, open_to, _ = select.select([report], [told] if due else [], [], LOOK)
        if open_to:
            try:
                due = due[os.write(told, due) :]
            except BrokenPipeError:
                due = b""
        if heard:
            part = os.read(report, LONGEST)
            if not part:
                return said, ""
            # Told after each word: several come at once where the process does not wait for an answer.
            for one in part:
                said += bytes([one])
                due += answers.get(said, b"")
            if not ready and said.startswith(READY):
                ready, begin = True, time.monotonic()
        if time.monotonic() - begin > (limits.seconds if ready else START):
            return said, f"ran longer than {limits.seconds:g} s" if ready else "did not start"
        if size_of(folder) > limits.disk * MIB:
            return said, f"wrote more than {limits.disk} MiB"
        if ended and not heard:
            return said, ""
    return said, "said too much"


def size_of(folder: Path) -> int:
    """Bytes that the files below a folder take, which may change meanwhile: as long as they are, or as many as were set
    aside for them; each counts for one block at least."""
    total = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(OSError):
                found = os.stat(os.path.join(place, name), follow_symlinks=False)
                total += max(4096, found.st_size, found.st_blocks * 512)
    return total


def run_all(programs: list[tuple[str, str]], limits: Limits | None = None, *, isolated: bool = True) -> list[Outcome]:
    """The outcome of each (solution, tests), as many at once as there are processors for this process."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
        return list(pool.map(lambda one: run(one[0], one[1], limits, isolated=isolated), programs))


@cache
def check(limits: Limits | None = None, *, isolated: bool = True) -> None:
    """Raise NoSandbox where a process cannot be isolated here, or where a program that does nothing fails."""
    limits = limits or Limits()
    outcome = run("", "", limits, isolated=isolated)
    if not outcome.passed:
        raise NoSandbox(refusal(f"a program that does nothing {outcome.reason}", limits, isolated=isolated))
