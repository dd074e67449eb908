"""Tests of a program that must not be able to judge itself. Runs inside of the sandbox, in two processes.

The program lives in one process (`serve`), the tests in another (`judge`), which the program can neither signal nor
trace nor read nor write. The tests see the program's names as stand-ins; a call travels as text, and what comes back is
rebuilt from plain built-in types. So a comparison is made by the judge's own interpreter on values that have no code of
the program in them, and the verdict leaves through a descriptor that the program never had.

Like `inside.py` this is text for an interpreter that knows no package: standard library alone, and `plain_values.py`,
which is put before it.
"""

import ast
import builtins
import importlib
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from largekd.sandbox.plain_values import decode, encode, receive, send

_MOST_WORDS = 500
_NEED_ARGUMENTS = ("UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError", "ExceptionGroup")
_MODULES = ("program", "solution", "main")
# CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR: calling such a function runs nothing of it.
_NOT_RUN_BY_A_CALL = 0x20 | 0x80 | 0x200
_REACHED = "__reached__"


# ---- the program's side --------------------------------------------------------------------------------------------


def serve(module: types.ModuleType, *, ask: int, answer: int) -> None:
    """Answer calls until nobody asks. Whatever happens here, it can only choose what is answered."""
    objects: list[Any] = []

    def keep(value: Any) -> Any:
        objects.append(value)
        return {"object": len(objects) - 1}

    def kept(coded: Any) -> Any:
        return getattr(module, coded["name"]) if "name" in coded else objects[coded["object"]]

    names = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    coded = {}
    for name, value in names.items():
        if isinstance(value, types.ModuleType):
            coded[name] = {"module": value.__name__}
        else:
            coded[name] = {"name": name} if callable(value) else encode(value, keep=keep)
    send(answer, list(coded.items()))
    while True:
        try:
            request = receive(ask)
        except EOFError:
            return
        attempt = _Attempt()
        with attempt:
            value = _answered(request, kept=kept)
            reply = {"value": encode(value, keep=keep)}
        if attempt.error is not None:
            kinds = [kind.__name__ for kind in type(attempt.error).__mro__]
            reply = {"raised": kinds, "words": _words(attempt.error)}
        send(answer, reply)


def _answered(request: dict[str, Any], *, kept: Callable[[Any], Any]) -> Any:
    target = kept(request["target"])
    given = [decode(one, kept=kept) for one in request["given"]]
    named = {name: decode(one, kept=kept) for name, one in request["named"]}
    what = request["what"]
    if what == "call":
        return target(*given, **named)
    if what == "attribute":
        return getattr(target, *given)
    if what == "item":
        return target[given[0]]
    if what == "length":
        return len(target)
    return list(target)


# ---- the judge's side ----------------------------------------------------------------------------------------------


class ProgramEnded(BaseException):
    """The program is gone, or says what is no answer. No `except Exception` of a test takes it for its own."""


class _Line:
    """Questions to the program, one after the other."""

    def __init__(self, *, ask: int, answer: int) -> None:
        self.ask = ask
        self.answer = answer
        self.broken: str | None = None

    def question(self, what: str, target: Any, given: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
        request = {
            "what": what,
            "target": target,
            "given": [encode(one, keep=_reference) for one in given],
            "named": [[name, encode(one, keep=_reference)] for name, one in (named or {}).items()],
        }
        reply = self.exchange(request)
        if isinstance(reply, dict) and "raised" in reply:
            raise _exception(reply)
        try:
            return decode(reply["value"], kept=self.stand_in)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self.ended(f"the program's answer is no value: {_words(error)}") from None

    def exchange(self, request: Any) -> Any:
        """Send (None: nothing) and receive."""
        try:
            if request is not None:
                send(self.ask, request)
            return receive(self.answer)
        except (OSError, EOFError):
            raise self.ended("the program ended before the tests did") from None
        except (ValueError, RecursionError) as error:
            raise self.ended(f"the program's answer is no value: {_words(error)}") from None

    def ended(self, reason: str) -> ProgramEnded:
        self.broken = self.broken or reason
        return ProgramEnded(self.broken)

    def stand_in(self, coded: Any) -> "StandIn":
        if not isinstance(coded, dict) or not ("name" in coded or "object" in coded):
            raise ValueError("no value")
        return StandIn(self, coded)


class StandIn:
    """A function, class or object of the program. It can be called, indexed, counted and run through, and its public
    attributes asked for; it has no truth value and equals nothing, or the program could decide a comparison."""

    def __init__(self, line: _Line, target: Any) -> None:
        self._line = line
        self._target = target

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._line.question("call", self._target, given, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._line.question("attribute", self._target, (name,))

    def __getitem__(self, key: Any) -> Any:
        return self._line.question("item", self._target, (key,))

    def __len__(self) -> int:
        return int(self._line.question("length", self._target))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._line.question("list", self._target))

    def _refused(self, *_: Any) -> Any:
        raise TypeError("an object of the program cannot be compared or judged by the program's own code")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = _refused
    __hash__ = object.__hash__


def _reference(value: Any) -> Any:
    if isinstance(value, StandIn):
        return value._target
    raise TypeError(f"tests cannot hand a {type(value).__name__} to the program, only plain values")


def _exception(reply: dict[str, Any]) -> Exception:
    """What the program raised, as the nearest built-in exception."""
    for name in reply["raised"]:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and name not in _NEED_ARGUMENTS:
            error = kind()
            error.args = (f"{reply['raised'][0]}: {reply.get('words', '')}",)
            return error
    return RuntimeError("the program ended itself")


class _Attempt:
    """Takes any exception of what is tried within, and holds it; a judge must outlive whatever a test does."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> "_Attempt":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error
        return True


class _Tally:
    """How many tests ran, and what went wrong."""

    def __init__(self) -> None:
        self.ran = 0
        self.problems: list[str] = []
        self.reached = 0

    def reach(self) -> None:
        """An assertion is about to be made."""
        self.reached += 1

    def attempt(self, label: str, run: Callable[[], Any]) -> bool:
        """Run it; false and a problem if it raised."""
        attempt = _Attempt()
        with attempt:
            run()
        if attempt.error is not None:
            self.problems.append(f"{label}: {type(attempt.error).__name__}: {_words(attempt.error)}")
        return attempt.error is None

    def test(self, label: str, run: Callable[[], Any], *, asserts: bool) -> None:
        """Run and count it. A program must not pass by a loop over nothing: with assertions, one must be reached."""
        before = self.reached
        self.ran += 1
        if self.attempt(label, run) and asserts and self.reached == before:
            self.problems.append(f"{label}: no assertion was reached")


class _Marked(ast.NodeTransformer):
    """Tells the tally of every assertion before it is made, and of every `try`, whose assertions may be there to show
    what must not be reached."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        return [self._mark(node), node]

    def visit_Try(self, node: ast.Try) -> list[ast.stmt]:
        self.generic_visit(node)
        return [self._mark(node), node]

    def _mark(self, node: ast.stmt) -> ast.stmt:
        call = ast.Expr(ast.Call(ast.Name(_REACHED, ast.Load()), [], []))
        return ast.fix_missing_locations(ast.copy_location(call, node))


def judge(tests: str, *, entry_point: str, ask: int, answer: int) -> str:
    """Run the tests against the program; JSON {"ran": int, "problems": [str, …]}, passed if ran > 0 and no problem.

    Counted are statements in which an assertion is reached, `check(entry point)`, functions test_* without arguments
    and the methods of unittest.TestCase classes.
    """
    tally, line = _Tally(), _Line(ask=ask, answer=answer)
    namespace: dict[str, Any] = {"__name__": "tests", _REACHED: tally.reach}
    tree = ast.Module(body=[], type_ignores=[])

    def begin() -> None:
        tree.body = ast.parse(tests).body
        _bind(line, namespace=namespace, tests=tree)

    if tally.attempt("program", begin):
        before = dict(namespace)
        asserting = {one.name for one in tree.body if isinstance(one, ast.FunctionDef) and _asserts(one)}
        run = lambda: _run_statements(tree, namespace=namespace, asserting=asserting, tally=tally)  # noqa: E731
        if tally.attempt("tests", run):
            defined = {name: value for name, value in namespace.items() if before.get(name) is not value}
            _run_defined(defined, entry_point=namespace.get(entry_point), asserting=asserting, tally=tally)
    if line.broken and line.broken not in str(tally.problems):
        tally.problems.append(line.broken)
    sys.stdout.flush()
    return json.dumps({"ran": tally.ran, "problems": tally.problems[:20]})


def _bind(line: _Line, *, namespace: dict[str, Any], tests: ast.Module) -> None:
    """The program's names as stand-ins, by themselves and as modules. Built-in names stay the interpreter's own, and so
    do what tests compare with: `isclose`, and modules of the standard library."""
    used_as_modules = {
        node.value.id
        for node in ast.walk(tests)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for name, coded in line.exchange(None):
        if not isinstance(name, str) or hasattr(builtins, name) or name.startswith("_"):
            continue
        is_module = isinstance(coded, dict) and "module" in coded
        if name == "isclose":
            namespace[name] = math.isclose
        elif name in sys.stdlib_module_names and (name in used_as_modules or is_module):
            namespace[name] = importlib.import_module(name)
        elif not is_module:
            namespace[name] = decode(coded, kept=line.stand_in)
    for name in _MODULES:
        module = types.ModuleType(name)
        vars(module).update({key: value for key, value in namespace.items() if not key.startswith("__")})
        sys.modules[name] = module


def _run_statements(tests: ast.Module, *, namespace: dict[str, Any], asserting: set[str], tally: _Tally) -> None:
    """Top-level statements in turn. A failing assertion is counted and the rest still runs; another failure ends it.
    `asserting` names the functions with assertions."""
    for statement in tests.body:
        marked = _Marked().visit(ast.Module(body=[statement], type_ignores=[]))
        run = types.FunctionType(compile(marked, "<tests>", "exec", dont_inherit=True), namespace)
        label, called = f"line {statement.lineno}", _called_test(statement)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            run()
        elif isinstance(statement, ast.If) and _asserts(statement):
            before = tally.reached
            tally.ran += not tally.attempt(label, run) or tally.reached > before
        elif called or _asserts(statement):
            tally.test(label, run, asserts=called in asserting or _asserts(statement))
        else:
            run()


def _asserts(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(statement))


def _called_test(statement: ast.stmt) -> str:
    """The name in `check(…)` or `test_…(…)`, a call of what the tests define; empty for any other statement."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
    return name if name == "check" or name.startswith("test_") else ""


def _run_defined(defined: dict[str, Any], *, entry_point: Any, asserting: set[str], tally: _Tally) -> None:
    """Test functions, test cases and `check` that the tests have defined; `asserting` name those with assertions."""
    for name, value in defined.items():
        if isinstance(value, types.FunctionType) and name == "check" and entry_point is not None:
            tally.test(name, lambda value=value: _called(value, entry_point), asserts=name in asserting)  # type: ignore[misc]
        elif isinstance(value, types.FunctionType) and name.startswith("test_") and not value.__code__.co_argcount:
            tally.test(name, lambda value=value: _called(value), asserts=name in asserting)  # type: ignore[misc]
        elif isinstance(value, type) and "unittest" in sys.modules:
            _run_case(value, tally=tally)


def _called(function: types.FunctionType, *given: Any) -> None:
    if function.__code__.co_flags & _NOT_RUN_BY_A_CALL:
        raise TypeError("a generator or coroutine does not run when it is called")
    function(*given)


def _run_case(case: type, *, tally: _Tally) -> None:
    """The methods of a unittest.TestCase; any other class is passed over."""
    unittest = sys.modules["unittest"]
    if not issubclass(case, unittest.TestCase):
        return
    loader, result = unittest.TestLoader(), unittest.TestResult()
    tally.attempt(case.__name__, lambda: loader.loadTestsFromTestCase(case).run(result))
    tally.ran += result.testsRun - len(result.skipped)
    for test, trace in (*result.failures, *result.errors):
        tally.problems.append(f"{test.id()}: {trace.strip().splitlines()[-1][:_MOST_WORDS]}")
    tally.problems += [f"{test.id()}: succeeded, not as expected" for test in result.unexpectedSuccesses]
    for name in () if hasattr(case, "asyncSetUp") else loader.getTestCaseNames(case):
        code = getattr(getattr(case, name), "__code__", None)
        if code is not None and code.co_flags & _NOT_RUN_BY_A_CALL:
            tally.problems.append(f"{name}: a generator or coroutine does not run when it is called")


def _words(error: BaseException) -> str:
    """An exception's message; its own code may fail, too."""
    attempt, words = _Attempt(), ""
    with attempt:
        words = str(error)[:_MOST_WORDS]
    return words
