"""A study: many runs, each in its own process and folder; finished ones are skipped, a failure stops none."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from niwaki.errors import ConfigError, UserError
from niwaki.measure.gather import find, read_config, read_metrics, read_run, save, tabulate
from niwaki.measure.report import duration, flatten, number

# settings that only name places; two configs that differ in these alone are the same point
PLACES = frozenset({"hydra", "study", "name", "resume", "debug"})
LONGEST_NAME = 100
STOPPED = 130


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a study: what is added to the command, the resolved config, and the overrides that vary."""

    overrides: tuple[str, ...]
    config: dict[str, Any]
    swept: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a point ended: `state` is done, skipped, failed or stopped; `text` is a score or an error."""

    point: Point
    folder: Path
    state: str
    text: str
    seconds: float = 0.0


def digest(config: Mapping[str, Any], places: frozenset[str] = PLACES) -> str:
    """Eight hex digits of a resolved config, without the keys in `places` (dotted) and all below them."""
    return hashlib.sha256(json.dumps(settings_of(config, places), sort_keys=True).encode()).hexdigest()[:8]


def settings_of(config: Mapping[str, Any], places: frozenset[str] = PLACES) -> dict[str, Any]:
    """The settings of a resolved config by their dotted keys, without those in `places` and all below them."""
    flat = flatten(json.loads(json.dumps(config, default=str)))
    below = tuple(f"{name}." for name in places)
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(below)}


def _safe(override: str) -> str:
    key, equals, value = override.strip().lstrip("+~").partition("=")
    value = re.sub(r"['\"\[\]\s]", "", value).replace(",", "+").replace("/", ".") or "none"
    return re.sub(r"[^A-Za-z0-9._+=-]", "-", f"{key}{equals}{value}" if equals else key)


def slug(swept: Sequence[str]) -> str:
    """A folder name for the overrides that vary: `compression=prune.magnitude,seed=0`, in any order."""
    name = ",".join(sorted(map(_safe, swept))).lstrip(".") or "run"
    if len(name) <= LONGEST_NAME:
        return name
    suffix = hashlib.sha256("\n".join(sorted(swept)).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{suffix}"


def quoted(value: object) -> str:
    """A value in Hydra's grammar, safe with commas, equal signs and blanks in it."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", str(value))
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _holds(folder: Path, places: frozenset[str]) -> str | None:
    """Digest of the config that ran in `folder`; None if there is none or it cannot be read."""
    try:
        return digest(read_config(folder), places)
    except UserError:
        return None


def _started(folder: Path) -> bool:
    return (folder / "metrics.json").exists() or _has_checkpoint(folder)


def _has_checkpoint(folder: Path) -> bool:
    return any(path.is_file() for path in (folder / "checkpoints").glob("**/*"))


def _candidates(point: Point, folder: Path, config: str) -> Iterator[Path]:
    name = slug(point.swept)
    yield folder / name
    yield folder / f"{name}-{config}"
    yield from (folder / f"{name}-{config}-{count}" for count in itertools.count(2))


def assign(points: Sequence[Point], folder: Path, places: frozenset[str] = PLACES) -> dict[Path, Point]:
    """A folder for each different point: the one with its config, else one without results."""
    different = {(slug(point.swept), digest(point.config, places)): point for point in points}
    found: dict[tuple[str, str], Path] = {}
    for (name, config), point in different.items():
        for candidate in itertools.islice(_candidates(point, folder, config), 3):
            if _started(candidate) and _holds(candidate, places) == config:
                found[name, config] = candidate
                break
    taken = set(found.values())
    for (name, config), point in different.items():
        if (name, config) not in found:
            candidates = _candidates(point, folder, config)
            found[name, config] = next(p for p in candidates if p not in taken and not _started(p))
            taken.add(found[name, config])
    return {found[key]: point for key, point in different.items()}


class Process:
    """Runs one child at a time and passes a stop on to it: first to let it save, then to end it."""

    def __init__(self) -> None:
        self.stopped = False
        self.child: subprocess.Popen[bytes] | None = None

    def stop(self, *_: object) -> None:
        """Signal handler: SIGINT to the child; the second time SIGKILL to it and its own children."""
        again, self.stopped = self.stopped, True
        # os.write: a signal may come in the middle of a print
        word = b"at once" if again else b"waiting for the run to save (a second time: at once)"
        os.write(2, b"\nstopping: " + word + b"\n")
        if self.child is not None and self.child.poll() is None:
            if again:
                os.killpg(self.child.pid, signal.SIGKILL)
            else:
                self.child.send_signal(signal.SIGINT)

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """Exit status of the command (negative: the signal that ended it); its output is added to `log`."""
        # spinning OpenMP threads slow two processes on one machine down many times over
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        with log.open("ab") as output:
            # its own group: a Ctrl-C of the terminal reaches it once, through `stop`
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            self.child = subprocess.Popen(arguments, env=environment, process_group=0, **streams)
            if self.stopped:
                self.child.send_signal(signal.SIGINT)
            return self.child.wait()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT, SIGTERM and, unless it is ignored (nohup), SIGHUP go to `stop` inside the block."""
        caught = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            caught.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.stop) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _last_error(log: Path, start: int) -> str:
    """The last line of the log after byte `start` that speaks of an error, else the last line of all."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.strip(" │|") for line in re.split(r"[\r\n]+", plain) if line.strip(" │|─╭╮╰╯")]
    errors = [line for line in lines if re.search(r"\b\w*error\b", line, re.IGNORECASE)]
    return (errors or lines or ["no output"])[-1][:300]


def _score(folder: Path) -> str:
    """The watched test score of a finished run."""
    metrics = read_metrics(folder)
    return f"{metrics['metric']} {number(metrics['metric'], metrics['after']['test'].get(metrics['metric']))}"


def _arguments(point: Point, folder: Path, command: Sequence[str]) -> list[str]:
    if _has_checkpoint(folder):
        return [*command, f"resume={quoted(folder)}"]
    return [*command, *point.overrides, f"hydra.run.dir={quoted(folder)}"]


def _ended(code: int, folder: Path, start: int) -> str | None:
    """Why a run counts as failed, None if it did not."""
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{hint}"
    if code:
        return _last_error(folder / "output.log", start)
    return None if (folder / "metrics.json").exists() else "exit status 0, but no metrics.json"


def _attempt(point: Point, folder: Path, command: Sequence[str], process: Process) -> tuple[str, str]:
    """State and text of one point's run."""
    log = folder / "output.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = log.stat().st_size if log.exists() else 0
        code = process.run(_arguments(point, folder, command), log)
        why = _ended(code, folder, start)
        if why is None:
            return "done", _score(folder)
    except (OSError, UserError) as error:
        why = str(error)
    return "stopped" if process.stopped else "failed", why


def run_point(point: Point, folder: Path, command: Sequence[str], process: Process) -> Outcome:
    """Runs one point to its end, or resumes it from its checkpoints."""
    began = time.monotonic()
    state, text = _attempt(point, folder, command, process)
    return Outcome(point=point, folder=folder, state=state, text=text, seconds=time.monotonic() - began)


def _left(outcomes: Sequence[Outcome], waiting: int) -> str:
    """Time that the remaining points take at the mean of those done here."""
    spent = [outcome.seconds for outcome in outcomes if outcome.state == "done"]
    return f", about {duration(sum(spent) / len(spent) * waiting)} left" if spent and waiting else ""


def _said(outcome: Outcome) -> str:
    if outcome.state == "skipped":
        return f"finished before, {outcome.text}"
    link = ", " if outcome.state == "done" else ": "
    return f"{outcome.state} in {duration(outcome.seconds)}{link}{outcome.text}"


def _finished(folder: Path) -> str | None:
    """The score of a run that finished; None if it did not, or left a broken file: it is run again."""
    try:
        return _score(folder) if (folder / "metrics.json").exists() else None
    except UserError:
        return None


def _run_all(assigned: Mapping[Path, Point], command: Sequence[str], process: Process) -> list[Outcome]:
    outcomes: list[Outcome] = []
    scores = {folder: _finished(folder) for folder in assigned}
    waiting = sum(score is None for score in scores.values())
    for count, (folder, point) in enumerate(assigned.items(), start=1):
        if process.stopped:
            break
        print(f"[{count}/{len(assigned)}] {' '.join(point.swept) or folder.name} ... ", end="", flush=True)
        score = scores[folder]
        if score is not None:
            outcomes.append(Outcome(point=point, folder=folder, state="skipped", text=score))
            print(_said(outcomes[-1]), flush=True)
            continue
        waiting -= 1
        outcomes.append(run_point(point, folder, command, process))
        print(_said(outcomes[-1]) + _left(outcomes, waiting), flush=True)
    return outcomes


def _report(folder: Path) -> None:
    """report.md, .csv and .png over all finished runs; a failure here is said and loses nothing."""
    try:
        finished, _ = find([folder])
        if finished:
            save(tabulate([read_run(run) for run in finished]), folder)
            print(f"report: {folder / 'report.md'}")
    except Exception as error:  # the runs matter more than their table
        print(f"no report written: {error}")


def _summary(outcomes: Sequence[Outcome], total: int, seconds: float) -> None:
    states = [outcome.state for outcome in outcomes]
    said = ", ".join(f"{states.count(state)} {state}" for state in ("done", "skipped", "failed"))
    print(f"{total} points: {said} in {duration(seconds)}")
    for outcome in outcomes:
        if outcome.state == "failed":
            print(f"failed: {outcome.folder}: {outcome.text} (see output.log there)")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the study's folder alone. ConfigError if it cannot be made or another process holds it."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"study: {folder} is in use by another process; wait, or choose another name") from None
    except OSError as error:
        reason = f"cannot write to {folder} ({error.strerror}); choose another place"
        raise ConfigError(f"study: {reason}") from None
    try:
        yield
    finally:
        lock.release()


def run_study(points: Sequence[Point], folder: Path, command: Sequence[str], *, places: frozenset[str] = PLACES) -> int:
    """Runs every point that has not finished, one process after the other, each in its own folder.

    A point finished with the same config (but for `places`) is skipped, one with checkpoints resumed.
    Returns 0, 1 if a point failed, 130 if it was stopped. ConfigError if another process holds the folder.
    """
    if not points:
        raise ConfigError("study: no points to run; give at least one")
    process, began = Process(), time.monotonic()
    with _locked(folder), process.listening():
        assigned = assign(points, folder, places)
        outcomes = _run_all(assigned, command, process)
        _summary(outcomes, len(assigned), time.monotonic() - began)
        if process.stopped:
            print("stopped; the same command goes on from here")
            return STOPPED
        _report(folder)
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0
