"""The examiner of a job: parses, runs programs in the sandbox, verifies."""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self, cast

from largekd.config.curation import CurationConfig
from largekd.curation.answer_shards import Answer
from largekd.curation.examination import Examined, Span
from largekd.curation.mathematics import Mathematics
from largekd.curation.parsing import parse, spans_of
from largekd.curation.records import Parsed, Verdict
from largekd.curation.verification import Means, TestsOutcome, verify_row
from largekd.sandbox.availability import check_isolation
from largekd.sandbox.programs import Program, ProgramResult, in_order, run_programs
from largekd.sandbox.unit_tests import run_tests


class StandardExaminer:
    """Programs of many rows run beside each other, as many as there are cores. Use it in a `with` statement: formulas
    are compared in a process of their own. Errors: ConfigError where programs are to run, but cannot be isolated."""

    def __init__(self, config: CurationConfig) -> None:
        self._config = config
        self._verify = config.verify
        self._at_once = len(os.sched_getaffinity(0))
        self._runs = self._verify.kind != "tests" and self._verify.programs != "ignore"
        if self._runs or self._verify.kind == "tests":
            check_isolation(self._verify.sandbox)
        # Votes of samples are compared as formulas too.
        has_formulas = self._verify.kind in ("symbolic", "majority")
        self._mathematics = Mathematics(cpu_s=self._verify.formula_cpu_s) if has_formulas else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mathematics is not None:
            self._mathematics.close()

    def examine(self, answers: Sequence[Answer]) -> list[Examined]:
        """Each answer's contents and verdict; the samples of a row stand beside each other, and vote together."""
        parsed = [parse(written.text, finish=written.finish, config=self._config) for _, written in answers]
        outputs = self._outputs(parsed)
        means = Means(run_tests=self._tested(answers, parsed=parsed), mathematics=self._mathematics)
        verdicts: list[Verdict] = []
        for start, stop in _rows(answers):
            found = verify_row(
                parsed[start:stop],
                answers[start].ask.item,
                config=self._verify,
                program_results=outputs[start:stop],
                means=means,
            )
            verdicts += found
        return [Examined(*pair) for pair in zip(parsed, verdicts, strict=True)]

    def spans(self, parsed: Parsed, text: str) -> list[Span]:
        """Where `parsed` stands in its text."""
        return cast(list[Span], spans_of(parsed, text))

    def _outputs(self, parsed: Sequence[Parsed]) -> list[ProgramResult | None]:
        """How each answer's program ended; None where there is none, or programs are not run."""
        if not self._runs:
            return [None] * len(parsed)
        programs = (Program(one.program) for one in parsed if one.program is not None)
        ended = run_programs(programs, config=self._verify.sandbox, at_once=self._at_once)
        return [None if one.program is None else next(ended) for one in parsed]

    def _tested(self, answers: Sequence[Answer], *, parsed: Sequence[Parsed]) -> "_Outcomes":
        """Outcomes of all programs with tests, run beside each other before they are asked for."""
        wanted: dict[tuple[str, str], str] = {}
        if self._verify.kind == "tests":
            for (ask, _), one in zip(answers, parsed, strict=True):
                if one.program is not None and ask.item.tests is not None:
                    wanted[one.program, ask.item.tests] = str(ask.item.fields.get("entry_point") or "")

        def run(pair: tuple[str, str]) -> TestsOutcome:
            code, tests = pair
            return run_tests(code, tests=tests, config=self._verify.sandbox, entry_point=wanted[pair])

        return _Outcomes(dict(zip(wanted, in_order(wanted, run=run, at_once=self._at_once), strict=True)))


class _Outcomes:
    """Known outcomes of tests, in the form in which verification asks for them."""

    def __init__(self, known: dict[tuple[str, str], TestsOutcome]) -> None:
        self._known = known

    def __call__(self, code: str, tests: str, /) -> TestsOutcome:
        return self._known[code, tests]


def _rows(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """Places where the answers of each row begin and end."""
    starts = [
        place for place, (ask, _) in enumerate(answers) if place == 0 or ask.item.id != answers[place - 1].ask.item.id
    ]
    return list(zip(starts, [*starts[1:], len(answers)], strict=True))
