"""Programs judged by tests: unit tests in Python, or pairs of input and expected output."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from largekd.config.sandbox import SandboxConfig
from largekd.errors import DataError
from largekd.sandbox.availability import check_isolation
from largekd.sandbox.process import Request
from largekd.sandbox.programs import (
    Program,
    ProgramResult,
    checked_files,
    encoded,
    result_of,
    run_programs,
    started,
)

NO_TEST = "the tests hold no test"
"""The only problem where nothing was tested, which says nothing of the program."""


@dataclass(frozen=True)
class Judgement:
    """`passed`: at least one test ran and none failed. `problems` name those that did; `program`: how it all ended."""

    passed: bool
    ran: int
    problems: tuple[str, ...]
    program: ProgramResult


@cache
def _judge_sources() -> tuple[bytes, bytes]:
    values, judge = (Path(__file__).with_name(name).read_bytes() for name in ("plain_values.py", "judge.py"))
    return values, judge


def run_tests(
    code: str,
    *,
    tests: str,
    config: SandboxConfig,
    entry_point: str = "",
    files: Mapping[str, str] | None = None,
) -> Judgement:
    """Import a program and run tests against it: assert statements, `check(candidate)` with the name of an entry
    point, test_* functions, unittest cases. Errors as of `run_program`.

    Guaranteed in the isolation `namespaces`: the program cannot make a test pass but by the plain values it returns,
    for tests run in a process of their own on values rebuilt from built-in types (see `judge.py`). It sees neither the
    tests nor what is expected. Printing, exiting and replacing built-ins do nothing for it. Names that the tests use
    but neither define nor import are the program's, but for `isclose` and modules of the standard library; so tests
    import whatever else they compare with. A loop over nothing, in which no assertion is reached, does not pass. With
    `limits_only` it can signal the judge and read its memory, and nothing is guaranteed.
    """
    check_isolation(config)
    request = Request(
        program=encoded(code),
        mode="tests",
        files=checked_files(files),
        more=(*_judge_sources(), encoded(entry_point), encoded(tests)),
    )
    ended = started(request, config=config)
    found = None if ended.stopped else _reported(ended.report)
    if found is None:
        program = result_of(ended)
        return Judgement(passed=False, ran=0, problems=(f"no verdict: {program.status}",), program=program)
    cpu_s, ran, problems = found
    passed = ran > 0 and not problems
    program = ProgramResult(
        status="ok" if passed else "error",
        exit_code=0 if passed else 1,
        stdout=ended.stdout.decode(errors="replace"),
        stderr=ended.stderr.decode(errors="replace"),
        wall_s=ended.wall_s,
        cpu_s=max(cpu_s, ended.cpu_s),
    )
    if not passed and not problems:
        problems = (NO_TEST,)
    return Judgement(passed=passed, ran=ran, problems=problems, program=program)


def _reported(report: str) -> tuple[float, int, tuple[str, ...]] | None:
    """CPU seconds, tests that ran, problems. None: no verdict, such as after tests that write where they should not."""
    head, _, verdict = report.partition("\n")
    words = head.split()
    try:
        if words[0] != "judged":
            return None
        found = json.loads(verdict)
        return float(words[1]), int(found["ran"]), tuple(map(str, found["problems"]))
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def run_output_tests(
    code: str, *, pairs: Sequence[tuple[str, str]], config: SandboxConfig, at_once: int = 1
) -> Judgement:
    """Run a script once per (standard input, expected standard output), which this process compares: line by line,
    white space at the ends of lines and of the text left out. Stops at the first that fails; `program` is the last run.
    Errors as of `run_program`; DataError also without any pair.
    """
    if not pairs:
        raise DataError("tests: no pairs of input and output, so nothing could fail")
    programs = [Program(code=code, stdin=stdin) for stdin, _ in pairs]
    ran = 0
    for result, (_, expected) in zip(run_programs(programs, config=config, at_once=at_once), pairs, strict=True):
        ran += 1
        problem = _difference(result, expected=expected)
        if problem:
            return Judgement(passed=False, ran=ran, problems=(f"pair {ran}: {problem}",), program=result)
    return Judgement(passed=True, ran=ran, problems=(), program=result)


def _difference(result: ProgramResult, *, expected: str) -> str:
    """What is wrong with an output; empty if nothing."""
    if result.status != "ok":
        return result.status
    wanted, written = _lines(expected), _lines(result.stdout)
    for number, (left, right) in enumerate(zip(wanted, written, strict=False), start=1):
        if left != right:
            return f"line {number}: {right[:100]!r} instead of {left[:100]!r}"
    return "" if len(wanted) == len(written) else f"{len(written)} lines instead of {len(wanted)}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
