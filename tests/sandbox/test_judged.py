"""Tests of programs: what passes, what fails, and programs that want to pass without being right."""

import textwrap

import pytest

from largekd.config.sandbox import SandboxConfig
from largekd.errors import DataError
from largekd.sandbox import plain_values
from largekd.sandbox.unit_tests import Judgement, run_output_tests, run_tests

ADD = "import math\ndef add(a, b):\n    return a + b\n"
STACK = """
class Stack:
    def __init__(self): self.held = []
    def push(self, one): self.held.append(one)
    def pop(self): return self.held.pop()
    def __len__(self): return len(self.held)
    def __getitem__(self, index): return self.held[index]
"""
CASES = """
import unittest
from solution import add

class Adding(unittest.TestCase):
    def test_numbers(self): self.assertEqual(add(1, 2), 3)
    def test_kinds(self): self.assertRaises(TypeError, add, 1, "a")
"""


def judged(code: str, tests: str, *, entry_point: str = "", cpu_s: float = 5.0) -> Judgement:
    config = SandboxConfig(wall_s=30.0, cpu_s=cpu_s)
    return run_tests(code, tests=tests, config=config, entry_point=entry_point)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("code", "tests", "entry_point", "ran"),
    [
        (ADD, "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'", "", 2),
        (ADD, "for n in range(5):\n    assert add(n, n) == 2 * n", "", 1),
        (ADD, "assert math.isclose(add(0.1, 0.2), 0.3)", "", 1),
        ("from math import isclose\n" + ADD, "assert isclose(add(0.1, 0.2), 0.3)", "", 1),
        (ADD, "try:\n    add(1, 'a')\n    assert False\nexcept TypeError:\n    pass", "", 1),
        (ADD, "if add(1, 2) == 3:\n    assert add(1, 1) == 2\nif __name__ == '__main__':\n    assert False", "", 1),
        (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3\n", "add", 1),
        (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)", "", 1),
        (ADD, "def test_add():\n    assert add(a=1, b=2) == 3", "", 1),
        (ADD, CASES, "", 2),
        (STACK, "s = Stack()\ns.push(3)\nassert len(s) == 1\nassert s[0] == 3\nassert s.pop() == 3", "", 3),
        ("def f(x): return x", "for v in [None, True, -10**6000, 1.5, 1j, 'ü', b'x', (1, [2]), {1: {2}}]:\n"
         "    assert f(v) == v and type(f(v)) is type(v)", "", 1),
        ("def f():\n    yield 1\n    yield 2", "assert list(f()) == [1, 2]", "", 1),
        ("limit = 5", "from program import limit\nassert limit == 5", "", 1),
        ("print('noise')\ndef f(): print('more'); return 1", "assert f() == 1", "", 1),
        ("if __name__ == '__main__': input()\ndef f(): return 1", "assert f() == 1", "", 1),
    ],
)  # fmt: skip
def test_right_programs_pass(code: str, tests: str, entry_point: str, ran: int) -> None:
    result = judged(code, tests, entry_point=entry_point)
    assert (result.problems, result.passed, result.ran, result.program.status) == ((), True, ran, "ok")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("code", "tests", "problem"),
    [
        (ADD, "assert add(1, 2) == 4\nassert add(1, 1) == 2", "line 1: AssertionError"),
        (ADD, CASES.replace("3)", "4)"), "AssertionError: 3 != 4"),
        (ADD, "assert subtract(1, 2) == 3", "NameError"),
        (ADD, "assert add(1, 'a')", "TypeError: TypeError: unsupported operand"),
        (ADD, "assert add(1, 2) ==", "SyntaxError"),
        (ADD, "x = add(1, 2)", "no test"),
        (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3", "no test"),
        ("def f(:", "assert True", "ended before"),
        # Nothing was compared.
        ("def f(x): return []", "for found, wanted in zip(f(1), [2]):\n    assert found == wanted", "no assertion was"),
        ("def f(x): return []", "def test_f():\n    for one in f(1):\n        assert one == 2", "no assertion was"),
        (
            "def f(x): return []",
            "def check(c):\n    for one in c(1):\n        assert one == 2\n\ncheck(f)",
            "no assertion",
        ),
        ("def f(x): return 0", "if __name__ == '__main__':\n    assert f(1) == 2", "no test"),
        ("def f(x): return 0", "async def test_f():\n    assert f(1) == 2", "does not run when it is called"),
        ("def f(x): return 0", "def test_f():\n    assert f(1) == 2\n    yield", "does not run when it is called"),
        (
            "def f(x): return 0",
            "import unittest\nclass T(unittest.TestCase):\n    async def test_f(self):\n"
            "        self.assertEqual(f(1), 2)",
            "does not run when it is called",
        ),
    ],
)
def test_wrong_programs_and_tests_fail(code: str, tests: str, problem: str) -> None:
    result = judged(code, tests)
    assert not result.passed
    assert problem in str(result.problems)


FORGERIES = {
    "prints a verdict": """
        print('judged 0.1\\n{"ran": 1, "problems": []}')
        def f(x): return 0
    """,
    "exits early": "import os; os._exit(0)",
    "exits when asked": """
        import os
        def f(x): os._exit(0)
    """,
    "raises SystemExit when asked": "def f(x): raise SystemExit(0)",
    "equals everything": """
        class E(int): __eq__ = lambda s, o: True
        def f(x): return E(0)
    """,
    "is an object that equals everything": """
        class E: __eq__ = lambda s, o: True
        def f(x): return E()
    """,
    "replaces built-ins": """
        import builtins
        builtins.AssertionError = Warning
        builtins.all = lambda x: True
        def f(x): return 0
    """,
    "writes to every descriptor": """
        import os
        def f(x):
            for number in range(3, 1024):
                try: os.write(number, b'judged 0.1\\n{"ran": 1, "problems": []}')
                except OSError: pass
            return 0
    """,
    "kills the judge": """
        import os
        def f(x):
            os.kill(1, 9)
            return 0
    """,
    "interrupts the judge": """
        import os
        def f(x):
            os.kill(1, 2)
            return 0
    """,
    "lays modules in the judge's way": """
        for name in ('json', 'ast', 'unittest', 'math', 'solution', 'importlib'):
            with open(name + '.py', 'w') as file:
                file.write('import os; [os.write(n, b"judged 0 {}") for n in (4, 5)]; os._exit(0)')
        def f(x): return 0
    """,
    "looks for the tests in memory": """
        import gc, re, sys
        def f(x):
            frame, seen = sys._getframe(), gc.get_objects()
            while frame:
                seen += [*frame.f_locals.values(), *frame.f_globals.values()]
                frame = frame.f_back
            for one in seen:
                found = re.search(r'f.1. == .(\\d+)', str(one) if isinstance(one, (str, bytes, list, dict)) else '')
                if found: return int(found[1])
            return 0
    """,
    "answers before it is asked": """
        import os
        for number in range(3, 1024):
            try: os.write(number, bytes(24))
            except OSError: pass
        def f(x): return 0
    """,
    "answers with too much": "def f(x): return 'x' * 20_000_000",
    "answers with depth": """
        def f(x):
            y = []
            for _ in range(900): y = [y]
            return y
    """,
    "defines the judge's names": """
        def check(x): pass
        def test_f(): pass
        def all(x): return True
        def f(x): return 0
    """,
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("how", FORGERIES)
def test_no_program_passes_without_being_right(how: str) -> None:
    tests = (
        "import math, unittest\ntry:\n    assert f(1) == 31337\nexcept Warning:\n    pass\nassert all([f(2) == 31337])"
    )
    result = judged(textwrap.dedent(FORGERIES[how]), tests)
    assert not result.passed
    assert result.problems


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("test", ["assert math.isclose(f(1), 31337)", "assert isclose(f(1), 31337)"])
def test_no_program_brings_its_own_comparison(test: str) -> None:
    code = """
        class math: isclose = staticmethod(lambda *_, **__: True)
        def isclose(*_, **__): return True
        def f(x): return 0
    """
    result = judged(textwrap.dedent(code), test)
    assert not result.passed
    assert "AssertionError" in str(result.problems)


@pytest.mark.usefixtures("unharmed")
def test_a_test_cannot_take_a_programs_end_for_an_expected_error() -> None:
    tests = "try:\n    f(1)\nexcept Exception:\n    pass\nassert True"
    assert not judged("import os\ndef f(x): os._exit(0)", tests).passed
    assert judged("def f(x): raise ValueError", tests).passed


@pytest.mark.usefixtures("unharmed")
def test_endless_programs_and_endless_tests() -> None:
    assert not judged("def f(x):\n    while True: pass", "assert f(1) == 1", cpu_s=1.0).passed
    assert judged(ADD, "while True: pass", cpu_s=1.0).program.status == "timeout"


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("words", ["garbage", "judged 0", "judged x\n{}", "judged 0\n[1]", "judged 0\n{'ran': 1}"])
def test_tests_that_write_nonsense_give_no_verdict(words: str) -> None:
    tests = (
        f"import os\nfor n in range(3, 1024):\n    try: os.write(n, b{words!r})\n    except OSError: pass\nassert True"
    )
    result = judged(ADD, tests)
    assert (result.passed, result.ran) == (False, 0)


@pytest.mark.usefixtures("unharmed")
def test_pairs_of_input_and_output() -> None:
    config = SandboxConfig(wall_s=30.0)
    code = "n = int(input())\nprint(n * n)\nprint('end ')"
    right = run_output_tests(code, pairs=[("2\n", "4\nend"), ("3", "9  \nend\n\n")], config=config, at_once=2)
    assert (right.passed, right.ran, right.problems) == (True, 2, ())
    wrong = run_output_tests(code, pairs=[("2", "4\nend"), ("3", "8\nend"), ("x", "")], config=config)
    assert (wrong.passed, wrong.ran, wrong.problems) == (False, 2, ("pair 2: line 1: '9' instead of '8'",))
    assert run_output_tests(code, pairs=[("2", "4")], config=config).problems == ("pair 1: 2 lines instead of 1",)
    assert run_output_tests(code, pairs=[("x", "4")], config=config).problems == ("pair 1: error",)


def test_no_pairs_are_no_tests() -> None:
    with pytest.raises(DataError, match="no pairs"):
        run_output_tests("print(1)", pairs=[], config=SandboxConfig(isolation="limits_only"))


def test_only_plain_values_are_decoded() -> None:
    def refuse(coded: object) -> object:
        raise ValueError(coded)

    for value in ([], 5, {"int": "1", "float": "x"}, {"eval": "1"}, {"list": [{"object": 0}]}, {"int": "import os"}):
        with pytest.raises(ValueError):
            plain_values.decode(value, kept=refuse)


def test_subclasses_arrive_as_their_plain_base() -> None:
    class Number(int):
        pass

    found = plain_values.decode(plain_values.encode([Number(3), True], keep=repr), kept=repr)
    assert (found, [type(one) for one in found]) == ([3, True], [int, bool])
