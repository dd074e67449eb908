"""The process that compares formulas: JSON lines in, JSON lines out. Run as a file by `mathematics.py`, never imported.

A formula comes from a model. Its LaTeX is read by a grammar (math-verify), but the numbers in it end in sympy's
`parse_expr`, which evaluates text as Python: it is replaced by one that reads numbers and nothing else. Should anything
evaluate a text after all, start a program, open a socket or write a file, the interpreter refuses. Memory is limited;
each comparison has so much CPU time, then the kernel ends this process, which no computation in C can put off.
"""

import json
import logging
import re
import resource
import signal
import sys
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "urllib.",
    "ftplib.",
    "http.",
    "webbrowser.",
)
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
FAILURES = (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError, AssertionError)


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: raises PermissionError for what no comparison needs. It cannot be removed."""
    if event.startswith(FORBIDDEN) and event not in HARMLESS:
        raise PermissionError(f"{event} is not for formulas")
    if event == "compile" and str(arguments[1]).startswith("<") and not _of_polynomials(arguments[0]):
        raise PermissionError("a formula is not evaluated")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise PermissionError("a formula writes no file")


def _of_polynomials(source: object) -> bool:
    """Whether this is the code that sympy makes for monomials of so many variables."""
    text = source.decode() if isinstance(source, bytes) else source
    return isinstance(text, str) and text.strip().startswith("def monomial_") and "__" not in text


def read_number(text: str, *_: Any, **__: Any) -> sympy.Basic:
    """The number that `text` is, in place of sympy's `parse_expr`.

    Raises:
        ValueError: it is something else.
    """
    if re.fullmatch(r"\s*[-+]?\d+\s*", text):
        return sympy.Integer(int(text))
    if re.fullmatch(r"\s*[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d{1,3})?\s*", text):
        return sympy.Float(text.strip())
    raise ValueError(f"{text[:40]!r} is no number")


def limit(*, memory_bytes: int) -> None:
    """Limits of this process, for good."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # Products of numbers with more digits take minutes; none is an answer.
    sys.set_int_max_str_digits(5000)


def read(latex: str) -> list[Any]:
    """The expressions that math-verify reads in `latex`; none where it is no formula."""
    config = [LatexExtractionConfig()]
    found = parse(f"${latex}$", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
    return list(found)


def compare(gold: str, answer: str) -> tuple[bool | None, str]:
    """Whether both are equal, or None and why that is unknown."""
    try:
        right, given = read(gold), read(answer)
        if not right or not given:
            return None, f"the {'answer' if right else 'right answer'} is no formula"
        return bool(verify(right, given, timeout_seconds=None, raise_on_error=True)), ""
    except (MemoryError, RecursionError, OverflowError, PermissionError) as error:
        return None, f"too large a formula ({type(error).__name__})"
    except FAILURES as error:
        return False, f"not comparable ({type(error).__name__})"


def main() -> None:
    """Answers until the other side closes."""
    memory_bytes, cpu_s = int(sys.argv[1]), float(sys.argv[2])
    logging.disable(logging.CRITICAL)
    # Modules that are imported at first use are there before anything is forbidden.
    compare(r"\frac{1}{2}", "0.5")
    compare("x^2+1", "(x+1)^2-2x")
    compare("[1,2)", "x>3")
    compare(r"\sqrt{2}\pi", r"\sin x + \log 3")
    sympy_parser.parse_expr = read_number
    limit(memory_bytes=memory_bytes)
    sys.addaudithook(forbid)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        equal, why = compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps([equal, why]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
