"""Programs per second in the sandbox:

    python tools/bench/sandbox.py --json sandbox.json

Short programs (a sum, printed), several at the same time, in three rounds of `--programs`; the bar is 20 per second in
the median round. Beside it: one at a time, with limits alone, the bare interpreter, programs that tests judge, and the
CPU time of one program, which says more on a busy machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from largekd.config.sandbox import SandboxConfig
from largekd.sandbox.availability import isolation_available
from largekd.sandbox.programs import Program, in_order, run_programs
from largekd.sandbox.unit_tests import run_tests

BAR_PER_S = 20.0


def main(argv: list[str] | None = None) -> int:
    """Measure, print, judge; exit status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=100, help="programs of a round")
    parser.add_argument("--at-once", type=int, default=2 * len(os.sched_getaffinity(0)), help="at the same time")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(argv)
    if reason := isolation_available():
        print(f"not measured: {reason}")
        return 1
    cells: dict[str, Callable[[], None]] = {
        f"namespaces, {given.at_once} at once": lambda: _scripts(given.programs, at_once=given.at_once),
        "namespaces, one at a time": lambda: _scripts(given.programs, at_once=1),
        "limits_only": lambda: _scripts(given.programs, at_once=given.at_once, isolation="limits_only"),
        "bare interpreter (-I -S)": lambda: _bare(given.programs, at_once=given.at_once),
        "judged by tests": lambda: _judged(given.programs, at_once=given.at_once),
    }
    rounds: dict[str, list[float]] = {name: [] for name in cells}
    cpu_ms: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(3):
        for name, run in cells.items():
            began, cpu = time.perf_counter(), _cpu_s()
            run()
            rounds[name].append(given.programs / (time.perf_counter() - began))
            cpu_ms[name].append((_cpu_s() - cpu) / given.programs * 1e3)
    for name, rates in rounds.items():
        spread = f"({min(rates):.1f} to {max(rates):.1f})"
        each = statistics.median(cpu_ms[name])
        print(f"{name:<28}{statistics.median(rates):8.1f} per second {spread:<18} CPU {each:5.1f} ms")
    reached = statistics.median(next(iter(rounds.values())))
    print(f"bar: {BAR_PER_S:g} per second: {'met' if reached >= BAR_PER_S else 'MISSED'}")
    if given.json:
        given.json.write_text(
            json.dumps({"per_second": rounds, "cpu_ms": cpu_ms, "programs": given.programs}, indent=2)
        )
    return 0 if reached >= BAR_PER_S else 1


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _scripts(count: int, *, at_once: int, isolation: str = "namespaces") -> None:
    config = SandboxConfig.model_validate({"isolation": isolation, "wall_s": 30.0})
    programs = [Program(code=f"print(sum(range({number})))") for number in range(count)]
    for number, result in enumerate(run_programs(programs, config=config, at_once=at_once)):
        assert result.stdout == f"{sum(range(number))}\n", result


def _judged(count: int, *, at_once: int) -> None:
    config = SandboxConfig(wall_s=30.0)

    def one(number: int) -> bool:
        code = f"def f(x):\n    return x + {number}\n"
        return run_tests(code, tests=f"assert f(1) == {number + 1}", config=config).passed

    assert all(in_order(range(count), run=one, at_once=at_once))


def _bare(count: int, *, at_once: int) -> None:
    python = SandboxConfig().python

    def one(number: int) -> str:
        command = [python, "-I", "-S", "-c", f"print(sum(range({number})))"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert [int(text) for text in in_order(range(count), run=one, at_once=at_once)] == [
        sum(range(number)) for number in range(count)
    ]


if __name__ == "__main__":
    sys.exit(main())
