"""Each test is an attack, or what an honest program may need."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from niwaki.errors import ConfigError
from niwaki.task import sandbox, sandboxed
from niwaki.task.sandbox import Limits, NoSandbox, Outcome, run

QUICK = Limits(seconds=2.0)
RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4\n"


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path) -> None:
    assert not (tmp_path / "evil").exists()


def fails(solution: str, reason: str, limits: Limits = QUICK) -> None:
    """The attack fails its sample for this reason, and the next sample runs as ever."""
    outcome = run(solution, TESTS, limits)
    assert not outcome.passed
    assert reason in outcome.reason
    assert run(RIGHT, TESTS, QUICK) == Outcome(True)


def test_right_passes_and_wrong_does_not() -> None:
    assert run(RIGHT, TESTS) == Outcome(True)
    assert run(RIGHT, "assert double(2) == 5") == Outcome(False, "AssertionError")
    assert run("def double(x)", TESTS).reason.startswith("SyntaxError")


def test_what_solutions_use_works() -> None:
    imports = (
        "import array, bisect, collections, copy, csv, dataclasses, datetime, decimal, enum, fractions, functools, "
        "hashlib, heapq, itertools, json, math, operator, random, re, statistics, string, sys, threading, time, "
        "typing, zoneinfo\n"
        "found = []\none = threading.Thread(target=found.append, args=(4,))\none.start()\none.join()\n"
        "open('own', 'w').write('4')\n@dataclasses.dataclass\nclass A:\n    x: int = 4\n"
    )
    assert run(imports, "assert found == [4] and open('own').read() == '4' and A().x == 4") == Outcome(True)


def test_sets_have_one_order() -> None:
    """So that a sample passes in each run or in none."""
    order = run("", "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))").reason
    assert order.startswith("ValueError")
    assert run("", "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))").reason == order


@pytest.mark.parametrize(
    "attack",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        "exit()",
        "import os\n[os.close(fd) for fd in range(3, 32)]",
        "import os\n[os.write(fd, b'RP' + b'0' * 32) for fd in range(3, 32) if not os.fstat(fd)]",
        "import builtins\nbuiltins.exec = builtins.compile = print\nbuiltins.AssertionError = ValueError",
    ],
)
def test_to_end_early_is_not_to_pass(attack: str) -> None:
    outcome = run(attack, TESTS, QUICK)
    assert not outcome.passed


def test_tests_cannot_be_swallowed() -> None:
    """By a text that is not closed, by a branch, by a tracer that steps over them."""
    for attack in ('text = """', "if False:\n    pass\n    "):
        assert not run(attack, '"""\n' + TESTS, QUICK).passed
        assert not run(attack, "    " + TESTS, QUICK).passed
    tracer = (
        "import sys\ndef jump(frame, event, value):\n"
        "    if frame.f_code.co_filename == 'tests' and event == 'line' and frame.f_lineno == 1:\n"
        "        frame.f_lineno = 2\n    return jump\nsys.settrace(jump)\n"
    )
    assert run(tracer, "assert False\nx = 1\n", QUICK) == Outcome(False, "AssertionError")


def test_a_forged_report_is_none() -> None:
    forged = (
        "import os\nfor fd in range(3, 32):\n"
        "    try:\n        os.write(fd, b'P' + b'0' * 32)\n    except OSError:\n        pass\n"
    )
    assert not run(forged + RIGHT, TESTS, QUICK).passed


def test_tests_and_number_wait_elsewhere_while_the_solution_is_loaded() -> None:
    forged = (
        "import os, sys\nframe = sys._getframe(1)\nwhile frame:\n    f = frame.f_locals\n"
        "    if 'report' in f:\n        os.set_blocking(f['told'], False)\n        word = os.read(f['told'], 64)\n"
        "        os.write(f['report'], b'LTP' + word)\n        os._exit(0)\n    frame = frame.f_back\n"
    )
    assert run(forged, "assert False", QUICK).reason.startswith("BlockingIOError")
    searched = (
        "import gc, sys\nfound = [one for one in gc.get_objects() if isinstance(one, dict) for text in one.values()\n"
        "    if isinstance(text, str) and 'a' 'mid the tests' in text]\n"
        "frame = sys._getframe(1)\nassert not {'job', 'tests', 'report', 'told'} & set(frame.f_locals)\n"
    )
    assert run(searched, "'amid the tests'\nassert not found", QUICK) == Outcome(True)


def test_an_answer_that_comes_before_its_question_is_none() -> None:
    """Nor one that was never asked for."""
    for word in ("L", "T", "LT", "LTP", "P", "LTP" + "0" * 32, "R"):
        said = f"import os\nfor fd in range(3, 32):\n    try: os.write(fd, b{word!r})\n    except OSError: pass\n"
        assert not run(said + "os._exit(0)", "assert False", QUICK).passed
        assert not run(said, "assert False", QUICK).passed


def test_tests_have_the_names_of_python_as_they_were() -> None:
    changed = "import builtins\nbuiltins.abs = builtins.len = lambda x: -1\nbuiltins.more = 1\n"
    assert run(changed, "assert abs(-3) < 1") == Outcome(False, "AssertionError")
    assert run(changed, "assert len('ab') == 2\nmore").reason.startswith("NameError")
    own = "__builtins__ = {'abs': lambda x: -1, 'AssertionError': ValueError}\n"
    assert run(own, "assert abs(-3) < 1") == Outcome(False, "AssertionError")


def test_tests_of_any_size_are_handed_over() -> None:
    long = "# " + "x" * 10**6 + "\n"
    assert run(RIGHT, long + TESTS, QUICK) == Outcome(True)
    assert run(RIGHT, long + "assert False", QUICK) == Outcome(False, "AssertionError")
    assert not run("import os\nos.closerange(3, 32)", long + TESTS, QUICK).passed
    assert run(RIGHT, "'\ud800'", QUICK).reason.startswith("UnicodeDecodeError")


def test_loops_are_stopped() -> None:
    begin = time.monotonic()
    fails("while True:\n    pass", "ran longer than 1 s", Limits(seconds=1.0))
    fails("import time\ntime.sleep(60)", "ran longer than 1 s", Limits(seconds=1.0))
    fails("try:\n    while True: pass\nexcept BaseException:\n    pass", "ran longer than 1 s", Limits(seconds=1.0))
    assert time.monotonic() - begin < 30


def test_memory_is_bounded() -> None:
    fails("x = bytearray(10**10)", "MemoryError")
    fails("x = []\nwhile True:\n    x.append(bytearray(10**7))", "MemoryError")


def test_no_process_is_started() -> None:
    for attack in (
        "import os\nos.fork()", "import os\nwhile True:\n    os.fork()", "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])", "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    ):  # fmt: skip
        fails(attack, "PermissionError")
    assert run("import os", "assert os.system('true') != 0") == Outcome(True)


def test_there_is_no_network() -> None:
    fails("import socket\nsocket.socket()", "PermissionError")
    fails("import socket\nsocket.socketpair()", "PermissionError")
    fails("import urllib.request as u\nu.urlopen('http://127.0.0.1:1')", "Error")


def test_nobody_is_signalled(tmp_path: Path) -> None:
    for attack in (
        "import os\nos.kill(os.getppid(), 9)", "import os\nos.kill(-1, 9)",
        "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
        f"import os\nos.kill({os.getpid()}, 15)",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
        "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
        f"assert library.ptrace(16, {os.getpid()}, 0, 0) == 0, ctypes.get_errno()",
    ):  # fmt: skip
        assert not run(attack, TESTS, QUICK).passed
    assert run(RIGHT, TESTS, QUICK) == Outcome(True)


def test_files_of_others_are_neither_read_nor_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for attack in (
        f"open({str(victim)!r})", f"open({str(victim)!r}, 'w')", f"open({str(tmp_path / 'evil')!r}, 'w')",
        f"import os\nos.remove({str(victim)!r})", f"import os\nos.rename({str(victim)!r}, 'own')",
        f"import os\nos.link({str(victim)!r}, 'own')", f"import os\nos.truncate({str(victim)!r}, 0)",
        f"import os\nos.chmod({str(victim)!r}, 0o777)", f"import os\nos.utime({str(victim)!r})",
        f"import os\nos.symlink({str(victim)!r}, 'own')\nopen('own', 'w')", "import os\nos.mkdir('deep')",
        f"import os\nos.listdir({str(tmp_path)!r})", f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        "open('/proc/self/mem', 'w')", "open('/etc/passwd')", "import os\nos.chroot('.')",
        "import os\nos.mkfifo('pipe')",
    ):  # fmt: skip
        fails(attack, "cross-device" if "os.link" in attack else "PermissionError")
    assert victim.read_text() == "mine"
    assert victim.stat().st_mode & 0o777 != 0o777
    assert list(tmp_path.iterdir()) == [victim]


def test_what_others_added_to_python_is_not_read(tmp_path: Path) -> None:
    for name in ("python3.11/site-packages/a", "python3/dist-packages/b", "python3.11/json", "gcc"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "python3.11" / "os.py").touch()
    (tmp_path / "python3.11" / "link.py").symlink_to("/etc/passwd")
    read = sandboxed.READ_DIR | sandboxed.READ_FILE
    found = sandboxed.without_installed(str(tmp_path))
    assert {str(Path(path).relative_to(tmp_path)): right for path, right in found.items()} == {
        ".": sandboxed.READ_DIR, "python3": sandboxed.READ_DIR, "python3.11": sandboxed.READ_DIR, "gcc": read,
        "python3.11/json": read, "python3.11/os.py": read,
    }  # fmt: skip
    installed = "import os, sys\nplace = os.path.join(os.path.dirname(os.__file__), 'site-packages')\n"
    opened = "for name in os.listdir(place):\n    open(os.path.join(place, name)) if '.' in name else None\n"
    if list(Path(os.__file__).parent.glob("site-packages/*.*")):
        fails(installed + opened, "PermissionError")


def test_files_of_others_are_not_watched() -> None:
    for call in ("inotify_init()", "inotify_init1(0)", "inotify_add_watch(3, b'/', 0xfff)"):
        watched = f"import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\nassert library.{call} >= 0, "
        fails(watched + "ctypes.get_errno()", "AssertionError: 1")


def test_the_disk_is_not_filled() -> None:
    fails("with open('big', 'w') as file:\n    while True:\n        file.write('x' * 10**6)", "File too large")
    fails("for i in range(10**9):\n    open(str(i), 'w').write('x' * 10**5)", "wrote more than 8 MiB")
    fails("x = [open(str(i), 'w') for i in range(1000)]", "Too many open files")


def test_no_room_is_set_aside_behind_the_end_of_a_file(tmp_path: Path) -> None:
    """FALLOC_FL_KEEP_SIZE takes blocks that no size tells."""
    kept = (
        "import ctypes, os\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
        "library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]\n"
        "file = os.open('own', os.O_RDWR | os.O_CREAT)\n"
        "assert library.fallocate(file, 1, 0, 2**26) == 0, ctypes.get_errno()\nimport time\ntime.sleep(0.3)\n"
    )
    assert run(kept, "", QUICK) == Outcome(False, "AssertionError: 1")
    assert "wrote more than 8 MiB" in run(kept, "", QUICK, isolated=False).reason
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "own").write_bytes(b"x" * 10**5)
    (tmp_path / "small").write_text("x")
    assert 10**5 + 2 * 4096 <= sandbox.size_of(tmp_path) <= 2 * 10**5


def test_what_is_written_stays_in_sight() -> None:
    """A file that is removed, replaced or nameless takes room as long as it is mapped."""
    for attack in (
        "import os\nopen('own', 'w')\nos.unlink('own')",
        "import os\nopen('a', 'w'), open('b', 'w')\nos.rename('a', 'b')",
        "import os\nos.open('.', os.O_TMPFILE | os.O_RDWR)",
        "import ctypes, os\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
        "if os.uname().machine == 'x86_64' and library.syscall(2, b'.', os.O_TMPFILE | os.O_RDWR, 0o600) < 0:\n"
        "    raise PermissionError",
    ):  # fmt: skip
        fails(attack, "PermissionError")
    wide = (
        "import ctypes, os\nlibrary = ctypes.CDLL(None, use_errno=True)\nhow = (ctypes.c_uint64 * 3)(2, 0, 0)\n"
        "if library.syscall(437, -100, b'/dev/null', how, 24) < 0:\n    raise OSError(ctypes.get_errno(), 'openat2')"
    )
    fails(wide, "OSError: [Errno 38] openat2")
    hidden = (
        "import mmap, os\nheld = []\nfor number in range(1000):\n    name = f'file{number}'\n"
        "    file = os.open(name, os.O_RDWR | os.O_CREAT)\n    os.write(file, b'x' * 10**6)\n"
        "    held.append(mmap.mmap(file, 4096))\n    os.close(file)\n"
        "    try:\n        os.unlink(name)\n    except OSError:\n        pass\n"
    )
    assert "wrote more than 8 MiB" in run(hidden + "import time\ntime.sleep(1)", TESTS, QUICK).reason


def test_output_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    fails("while True:\n    print('x' * 10**6)", "ran longer than 1 s", Limits(seconds=1.0))
    assert run("import sys\nprint('x' * 10**7)\nprint('y', file=sys.stderr)\n" + RIGHT, TESTS, QUICK) == Outcome(True)
    said = capfd.readouterr()
    assert said.out == said.err == ""
    fails("raise ValueError('x' * 10**7)", "ValueError: xxx")
    everywhere = "for fd in range(3, 32):\n        try: os.write(fd, b'x' * 4096)\n        except OSError: pass"
    fails(f"import os\nwhile True:\n    {everywhere}", "said too much")


def test_there_is_no_input() -> None:
    fails("input()", "EOFError")
    fails("import sys\nassert sys.stdin.read()", "AssertionError")


def test_limits_cannot_be_lifted() -> None:
    fails("import resource as r\nr.setrlimit(r.RLIMIT_FSIZE, (r.RLIM_INFINITY,) * 2)", "Error")
    fails("import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0", "AssertionError")


def test_threads_do_not_outlive() -> None:
    lasting = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    begin, before = time.monotonic(), threading.active_count()
    assert run(lasting + RIGHT, TESTS, QUICK) == Outcome(True)
    assert time.monotonic() - begin < 10
    assert threading.active_count() == before


def test_an_error_that_hurts_to_read() -> None:
    fails("class Evil(Exception):\n    def __str__(self):\n        raise KeyboardInterrupt\nraise Evil", "Evil")


def test_many_at_once_are_in_order_and_leave_no_pipe() -> None:
    before = len(os.listdir("/proc/self/fd"))
    programs = [(RIGHT, f"assert double(2) == {number}") for number in range(3, 9)] * 2
    assert [one.passed for one in sandbox.run_all(programs, QUICK)] == [False, True, False, False, False, False] * 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_isolation_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "sandboxed.py"
    source = sandbox.CHILD.read_text().replace('called(library, "prctl", 22, 2', 'called(library, "prctl", 22, 99')
    broken.write_text(source)
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(ConfigError, match=r"task.unsafe=false: this machine cannot isolate a process"):
        run(RIGHT, TESTS)
    assert run(RIGHT, TESTS, isolated=False) == Outcome(True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is the parent of those that lose theirs")
@pytest.mark.parametrize("end", ["", "while True:\n    pass\n", "os._exit(0)\n", "os.kill(os.getpid(), 9)\n"])
def test_without_isolation_what_was_started_ends_too(end: str, tmp_path: Path) -> None:
    """In a session of its own, and without its parent."""
    told = tmp_path / "told"
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.setsid()\n"
        f"        open({str(told)!r} + '-', 'w').write(str(os.getpid()))\n"
        f"        os.rename({str(told)!r} + '-', {str(told)!r})\n"
        "        while True:\n            time.sleep(1)\n    os._exit(0)\nos.wait()\n"
        f"while not os.path.exists({str(told)!r}):\n    time.sleep(0.01)\n"
    )
    outcome = run(daemon + end + RIGHT, TESTS, QUICK, isolated=False)
    assert outcome.passed == (not end)
    assert ("ran longer" if "while" in end else "ended" if end else "") in outcome.reason
    assert not Path(f"/proc/{told.read_text()}").exists()
    deep = "import os\nos.mkdir('deep')\nfor i in range(100):\n    open(f'deep/{i}', 'wb').write(b'x' * 10**6)\n"
    assert "wrote more than 8 MiB" in run(deep + "while True: pass", "", QUICK, isolated=False).reason


def test_the_last_words_of_a_process_are_heard(tmp_path: Path) -> None:
    """Those that it says between two looks, and ends."""
    read, write = os.pipe()

    class Child:
        said = False

        def poll(self) -> int:
            if not self.said:
                os.write(write, b"RLTP")
                self.said = True
            return 0

    child: Any = Child()
    assert sandbox.listen(child, read, write, {}, tmp_path, QUICK) == (b"RLTP", "")
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("harness", "why"),
    [
        ("import sys\nsys.exit(3)", "ended with 3"),
        ("import os\nos.abort()", "ended by SIGABRT"),
        ("import os, sys\nos.write(int(sys.argv[1]), b'X' + b'OSError: no')", "OSError: no"),
    ],
)
def test_a_process_that_ends_before_the_program_is_no_failure_of_the_program(
    harness: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "sandboxed.py"
    broken.write_text(harness)
    monkeypatch.setattr(sandbox, "CHILD", broken)
    for isolated in (True, False):
        with pytest.raises(NoSandbox, match=f"task.unsafe={not isolated}".lower() + rf".*\({why}\)"):
            run(RIGHT, TESTS, isolated=isolated)


def test_the_trial_has_to_pass_within_the_limits_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check(Limits(seconds=20.0))
    short = Limits(seconds=1e-6)
    with pytest.raises(NoSandbox, match=r"task.timeout=1e-06 s \(a program that does nothing ran longer than"):
        sandbox.check(short)
    with pytest.raises(NoSandbox, match=r"task\.memory=8 MiB"):
        sandbox.check(Limits(memory=8), isolated=False)
