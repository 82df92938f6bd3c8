"""Code generation: Python from a description, judged by running it (Chen et al. 2021, arXiv:2107.03374; Austin et al.
2021, arXiv:2108.07732)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from niwaki.data.source import Needs
from niwaki.errors import ConfigError
from niwaki.task import sandbox
from niwaki.task.layout import layout_of
from niwaki.task.task import IGNORED, Batch, Rows, Scores
from niwaki.task.text_to_text import BETWEEN, TextScores, TextToText, references_of

if TYPE_CHECKING:
    from niwaki.model.anatomy import Anatomy

FUNCTION = re.compile(r"^(async )?def \w+", re.MULTILINE)
CALL = re.compile(r"^check\(", re.MULTILINE)
CUT = "the prompt is longer than task.max_length"  # why a problem has failed
ENDLESS = 2**30
# What ends a body, as HumanEval has it; what ends a program, which may hold several functions.
OF_BODIES = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
OF_PROGRAMS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```", "\n<|")


@dataclass(frozen=True, kw_only=True)
class CodeGeneration(TextToText):
    """pass@k: the chance that one of k programs passes its tests, estimated from `samples` of each problem.

    A prompt with the head of a function (HumanEval) is gone on with; any other (MBPP) is shown as a docstring with the
    first `shown_tests` assertions of its tests, and the answer is the whole program. An answer ends before the first of
    `stop`; null is what the two benchmarks use. Each runs for `timeout` seconds at most, in a sandbox; `unsafe` runs it
    with your rights where there is none. A program and its tests share a process, so one that is written to deceive the
    tests while they run passes, which no sandbox can rule out. Prompts that are too long lose their beginning, and fail
    where they are scored.
    """

    needs: ClassVar[Needs] = Needs(
        required=("prompt", "solution", "tests", "entry_point"), optional=("id",), hints=("tests",)
    )
    answer: ClassVar[str] = "solution"
    keeps_end: ClassVar[bool] = True
    metric: ClassVar[str] = "pass@1"
    paper: ClassVar[str] = "Chen et al. 2021, arXiv:2107.03374; Austin et al. 2021, arXiv:2108.07732"
    unread: ClassVar[tuple[str, ...]] = (*TextToText.unread, "samples", "k", "stop", "timeout", "memory", "unsafe")

    max_length: int = 1024
    max_target_length: int = 512
    separator: str | None = ""
    samples: int = 1
    k: Sequence[int] = (1,)
    stop: Sequence[str] | None = None
    shown_tests: int = 1
    timeout: float = 5.0
    memory: int = 512
    unsafe: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ConfigError(f"task.samples={self.samples}: needs a whole number of at least 1")
        if self.samples > 1 and not self.do_sample:
            raise ConfigError(f"task.samples={self.samples}: a search finds one text; needs task.do_sample=true")
        if 1 not in self.k or any(not 1 <= one <= self.samples for one in self.k):
            raise ConfigError(f"task.k={list(self.k)}: needs 1, and numbers up to task.samples={self.samples}")
        if self.shown_tests < 0:
            raise ConfigError(f"task.shown_tests={self.shown_tests}: needs a whole number of at least 0")
        if self.timeout <= 0 or self.memory < 64:
            name, least = ("timeout", "above 0") if self.timeout <= 0 else ("memory", "of at least 64")
            raise ConfigError(f"task.{name}={getattr(self, name)}: needs a number {least}")

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        sandbox.check(self.limits, isolated=not self.unsafe)

    @property
    def limits(self) -> sandbox.Limits:
        """Of each program."""
        return sandbox.Limits(seconds=float(self.timeout), memory=self.memory)

    def _sources(self, rows: Rows) -> list[str]:
        tests = rows.get("tests", [""] * len(rows["prompt"]))
        return [self.prefix.format() + self._shown(*pair) for pair in zip(rows["prompt"], tests, strict=True)]

    def _shown(self, prompt: str, tests: str) -> str:
        if FUNCTION.search(prompt):
            return prompt
        asserted = [line for line in tests.splitlines() if line.startswith("assert")]
        lines = [prompt.strip(), *asserted[: self.shown_tests]]
        return '"""\n' + "\n".join(lines) + '\n"""\n'

    def encode(self, rows: Rows, tokenizer: Any, labels: Sequence[str]) -> Rows:
        found = super().encode(rows, tokenizer, labels)
        whole = replace(self, max_length=ENDLESS)._read(rows, tokenizer)
        for number, (ids, uncut) in enumerate(zip(found["input_ids"], whole, strict=True)):
            if len(ids) < len(uncut):
                found["reference"][number] += [BETWEEN, *CUT.encode()]
        return found

    def _right(self, rows: Rows) -> list[list[str]]:
        """Prompt, tests and the name of the function, for those who run the answer."""
        return [list(one) for one in zip(rows["prompt"], rows["tests"], rows["entry_point"], strict=True)]

    def score(self, scores: Scores, model: Any, batch: Batch) -> None:
        scores.update(model(**self.inputs(batch)), batch)
        assert isinstance(scores, PassScores)
        drawn = [scores.read(batch, self.answered(model, batch, number)) for number in range(self.samples)]
        for (prompt, tests, name, *cut), texts in zip(
            references_of(batch["reference"]), zip(*drawn, strict=True), strict=True
        ):
            answers = [self.ended(prompt, text) for text in texts]
            scores.take(prompt, tests, name, answers, failed=cut[0] if cut else "")

    def ended(self, prompt: str, text: str) -> str:
        """An answer without what follows the function, or the program."""
        own = self.stop if self.stop is not None else OF_BODIES if FUNCTION.search(prompt) else OF_PROGRAMS
        return text[: min((place for one in own if (place := text.find(one)) >= 0), default=len(text))]

    def scores(self, labels: Sequence[str], tokenizer: Any = None) -> PassScores:
        return PassScores(tokenizer, tuple(self.k), self.limits, isolated=not self.unsafe)

    def answers(
        self, model: Any, tokenizer: Any, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        # Some rows may show tests where others do not.
        asked = [{"prompt": row["prompt"], "tests": row.get("tests", "")} for row in rows]
        answered = iter(rows)
        for batch, _ in self._asked(model, tokenizer, asked):
            for text in code_of(batch, self.answered(model, batch), tokenizer):
                row = next(answered)
                yield {**row, "generated": self.ended(row["prompt"], text)}


def program(prompt: str, answer: str, tests: str, name: str) -> tuple[str, str]:
    """(solution, tests) to run: the answer behind the prompt that it goes on with, or alone."""
    solution = prompt + answer if FUNCTION.search(prompt) else answer
    call = f"\ncheck({name})\n" if "def check(" in tests and not CALL.search(tests) else ""
    return solution, tests + call


def code_of(batch: Batch, written: Tensor, tokenizer: Any) -> list[str]:
    """What was written, spaces and lines as they are: behind a source that the same decoder read, what it adds to its
    text, since some tokenizers leave out the space before a first word."""

    def decoded(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    answers = [[token for token in row if token != IGNORED] for row in written.tolist()]
    layout = layout_of(batch)
    if layout.crossed:
        return list(map(decoded, answers))
    found = []
    for source, answer in zip(layout.sources(batch), answers, strict=True):
        before, whole = decoded(source.tolist()), decoded([*source.tolist(), *answer])
        found.append(whole[len(before) :] if whole.startswith(before) else decoded(answer))
    return found


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that of k of the n samples, c of which pass, one does; as a product, which
    holds for any n (Chen et al. 2021, figure 3)."""
    if samples - right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)))


class PassScores(TextScores):
    """pass@k for each k, in 0..1, beside loss and perplexity of the solutions of the data."""

    def __init__(self, tokenizer: Any, k: tuple[int, ...], limits: sandbox.Limits, *, isolated: bool) -> None:
        super().__init__(tokenizer)
        self._k = k
        self._limits = limits
        self._isolated = isolated
        self._problems: list[list[tuple[str, str] | sandbox.Outcome]] = []
        self.outcomes: list[list[sandbox.Outcome]] = []

    def read(self, batch: Batch, written: Tensor) -> list[str]:
        """What was written in answer to a batch."""
        return code_of(batch, written, self._tokenizer)

    def take(self, prompt: str, tests: str, name: str, answers: Sequence[str], *, failed: str = "") -> None:
        """The answers to one problem, which `failed` before it was read, or not."""
        self._problems.append(
            [sandbox.Outcome(False, failed) if failed else program(prompt, one, tests, name) for one in answers]
        )

    def compute(self) -> dict[str, float]:
        due = self._problems[len(self.outcomes) :]
        programs = [one for problem in due for one in problem if not isinstance(one, sandbox.Outcome)]
        found = iter(sandbox.run_all(programs, self._limits, isolated=self._isolated))
        self.outcomes += [
            [one if isinstance(one, sandbox.Outcome) else next(found) for one in problem] for problem in due
        ]
        right = [(len(one), sum(outcome.passed for outcome in one)) for one in self.outcomes]
        return {
            **{f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in right) / len(right) for k in self._k},
            **super().compute(),
        }

    def report(self) -> dict[str, Any]:
        """Why programs failed, by kind."""
        kinds: dict[str, int] = {}
        for outcome in (outcome for one in self.outcomes for outcome in one):
            kind = "passed" if outcome.passed else outcome.reason.partition(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        return {"outcomes": kinds}
