"""Equality of formulas, asked of a process that is ended when it takes too long."""

import json
import os
import re
import selectors
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from largekd.errors import DataError

WORKER = Path(__file__).with_name("math_worker.py")
LONGEST = 500
MEMORY_BYTES = 2 * 2**30
START_S = 120.0
# A loaded machine gives a process little of its time; CPU time decides, this is for one that waits for ever.
WALL_PER_CPU = 20.0

_PLAIN = (
    (re.compile(r"\*\*"), "^"),
    (
        re.compile(r"(?<!\\)\b(sqrt|cbrt)\s*\(([^()]*)\)"),
        lambda m: rf"\sqrt{'[3]' if m[1] == 'cbrt' else ''}{{{m[2]}}}",
    ),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\w+)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\^(-?\d{2,}|-\d)"), r"^{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|ln|log|theta|alpha|beta)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"(?<![\\a-zA-Z])(?:infinity|inf|oo)(?![a-zA-Z])|∞"), r"\\infty "),
    (re.compile("π"), r"\\pi "),
    (re.compile("≤|<=|=<"), r"\\le "),
    (re.compile("≥|>="), r"\\ge "),
    (re.compile("≠|!="), r"\\ne "),
    (re.compile(r"±|\+/-"), r"\\pm "),
    (re.compile("∪"), r"\\cup "),
    (re.compile("[×·*]"), r"\\cdot "),
    (re.compile("°"), r"^\\circ "),
    (re.compile("[−–]"), "-"),
    (re.compile(r"(?<!\\)%"), r"\\%"),
)


class Comparison(NamedTuple):
    """Whether two formulas are equal; None where that is unknown, and why."""

    equal: bool | None
    why: str = ""


def latex_of(text: str) -> str:
    """`text` with the usual plain notation (`sqrt(2)`, `x**2`, `pi`, `<=`) as LaTeX, without delimiters around it."""
    text = re.sub(r"\\?\$|(?<!\\)\\[()\[\]]", "", text).strip()
    # Sets are written with plain braces in plain text.
    if text.startswith("{") and text.endswith("}") and "\\" not in text:
        text = rf"\{{{text[1:-1]}\}}"
    for pattern, written in _PLAIN:
        text = pattern.sub(written, text)
    return text


class Mathematics:
    """Compares formulas; a context manager that ends its process. The process starts at the first question.

    cpu_s: CPU seconds for one comparison. A formula that takes longer is unknown, and the next one asks a new process.
    """

    def __init__(self, *, cpu_s: float = 3.0) -> None:
        self._cpu_s = cpu_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process.wait()
            self._process = None

    def equal(self, *, gold: str, answer: str) -> Comparison:
        """Whether `answer` is the formula `gold`, both LaTeX or plain notation.

        Raises:
            DataError: the process does not start, because math-verify is missing or broken.
        """
        if max(len(gold), len(answer)) > LONGEST:
            return Comparison(None, f"longer than {LONGEST} characters")
        process = self._process or self._start()
        question = json.dumps([latex_of(gold), latex_of(answer)]) + "\n"
        try:
            assert process.stdin is not None
            process.stdin.write(question.encode())
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return Comparison(None, "the comparing process ended")
        line = self._line(process, wall_s=WALL_PER_CPU * self._cpu_s)
        if line is None:
            self.close()
            return Comparison(None, f"not decided within {self._cpu_s:g} CPU seconds")
        return Comparison(*json.loads(line))

    def _start(self) -> "subprocess.Popen[bytes]":
        # Isolated: neither this folder nor the user's PYTHON… variables decide what is imported.
        process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), str(MEMORY_BYTES), str(self._cpu_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            cwd="/",
        )
        self._process = process
        if self._line(process, wall_s=START_S) != b"ready":
            self.close()
            raise DataError(
                "verify.kind = 'symbolic': the process that compares formulas did not start; it needs the package "
                f"math-verify (pip install 'largekd[factory]'). To see why: {sys.executable} -I {WORKER} 2000000000 3"
            )
        return process

    def _line(self, process: "subprocess.Popen[bytes]", *, wall_s: float) -> bytes | None:
        """The next line; None when the process ended or so much time has passed."""
        assert process.stdout is not None
        until, found = time.monotonic() + wall_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    return None
                found += part
        return found.strip()
