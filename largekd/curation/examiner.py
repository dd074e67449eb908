"""Parsing and verification of whole rows, with the processes they need."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from largekd.config.curation import CurationConfig
from largekd.curation.mathematics import Mathematics
from largekd.curation.parsing import parse
from largekd.curation.records import Item, Parsed, Verdict, Written
from largekd.curation.verification import Means, ProgramOutcome, RunTests, verify_row

RunPrograms = Callable[[Sequence[str]], Sequence[ProgramOutcome]]
"""run_programs(codes): how each ended, in order."""


class RowExaminer:
    """Examines rows, one at a time; a context manager that ends the process which compares formulas."""

    def __init__(
        self, config: CurationConfig, *, run_programs: RunPrograms | None = None, run_tests: RunTests | None = None
    ) -> None:
        """run_programs, run_tests: the sandbox; needed where `config.verify` has programs or tests run."""
        assert config.verify.programs == "ignore" or run_programs is not None
        assert config.verify.kind != "tests" or run_tests is not None
        self._config = config
        self._run_programs = run_programs
        # Votes compare formulas too; the process starts at the first question that needs it.
        formulas = config.verify.kind in ("symbolic", "majority")
        self._mathematics = Mathematics(cpu_s=config.verify.formula_cpu_s) if formulas else None
        self._means = Means(run_tests=run_tests, mathematics=self._mathematics)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mathematics is not None:
            self._mathematics.close()

    def examine(self, item: Item, written: Sequence[Written]) -> list[tuple[Parsed, Verdict]]:
        """What each of a row's answers holds, and its verdict; all samples of the row, so that they can vote."""
        parsed = [parse(one.text, finish=one.finish, config=self._config) for one in written]
        results = self._ended(parsed)
        verdicts = verify_row(parsed, item, config=self._config.verify, program_results=results, means=self._means)
        return list(zip(parsed, verdicts, strict=True))

    def _ended(self, parsed: Sequence[Parsed]) -> list[ProgramOutcome | None]:
        if self._config.verify.programs == "ignore" or self._config.verify.kind == "tests":
            return [None] * len(parsed)
        assert self._run_programs is not None
        codes = [one.program for one in parsed if one.program is not None]
        ended = iter(self._run_programs(codes) if codes else ())
        return [None if one.program is None else next(ended) for one in parsed]
