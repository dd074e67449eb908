"""Programs that mean no harm: input, output, files, packages, order, limits; and what is refused before they start."""

import os
import stat
from pathlib import Path

import pytest

from largekd.config.sandbox import SandboxConfig
from largekd.errors import ConfigError, DataError, GenerationError
from largekd.sandbox import availability, process, programs
from largekd.sandbox.programs import Program, run_program, run_programs


@pytest.fixture(params=["namespaces", "limits_only"])
def either(request: pytest.FixtureRequest, system_python: None) -> SandboxConfig:
    """Both isolations; what a program sees is the same."""
    if request.param == "namespaces" and (reason := availability.isolation_available()):
        pytest.skip(reason)
    return SandboxConfig(isolation=request.param, wall_s=20.0)


def test_output_input_and_exit_status(either: SandboxConfig) -> None:
    result = run_program(
        "import sys\nprint(input()[::-1])\nprint('bad', file=sys.stderr)\nexit(3)", config=either, stdin="olleh"
    )
    assert (result.status, result.exit_code, result.stdout, result.stderr) == ("error", 3, "hello\n", "bad\n")
    result = run_program("if __name__ == '__main__': print(6 * 7)", config=either)
    assert (result.status, result.exit_code, result.stdout) == ("ok", 0, "42\n")
    assert result.cpu_s > 0
    assert result.wall_s > 0


def test_a_traceback_shows_the_program_alone(either: SandboxConfig) -> None:
    result = run_program("def f():\n    return 1 / 0\nf()", config=either)
    assert (result.status, result.exit_code) == ("error", 1)
    assert "return 1 / 0" in result.stderr
    assert "<string>" not in result.stderr
    assert result.stderr.count("program.py") == 2
    assert "SyntaxError" in run_program("def f(:", config=either).stderr


def test_input_larger_than_a_pipe_and_input_that_nobody_reads(either: SandboxConfig) -> None:
    result = run_program("import sys\nprint(len(sys.stdin.read()))", config=either, stdin="x" * 300_000)
    assert result.stdout == "300000\n"
    assert run_program("print(1)", config=either, stdin="x" * 300_000).stdout == "1\n"
    assert "EOFError" in run_program("input()", config=either).stderr


def test_files_and_their_names(either: SandboxConfig) -> None:
    code = "import part\nprint(part.answer, open('deep/er/data.txt').read())"
    assert run_program(code, config=either, files={"part.py": "answer = 1", "deep/er/data.txt": "ü"}).stdout == "1 ü\n"
    for name in ("/etc/x", "../x", "a/../../x", "", "program.py", "x\0y"):
        with pytest.raises(DataError, match="below the working folder"):
            run_program("1", config=either, files={name: ""})


def test_files_do_not_count_as_scratch(isolated: None) -> None:
    config = SandboxConfig(wall_s=20.0, scratch_bytes=8192)
    code = "open('x', 'w').write('x' * 8000)\nprint(len(open('y').read()))"
    assert run_program(code, config=config, files={"y": "y" * 100_001}).stdout == "100001\n"


def test_text_that_is_no_unicode(either: SandboxConfig) -> None:
    assert run_program("print('\ud800' == '?')", config=either).stdout == "True\n"
    assert run_program("import os\nos.write(1, b'\\xff')", config=either).stdout == "�"


def test_threads_are_waited_for_and_streams_written_out(either: SandboxConfig) -> None:
    code = "import sys, threading, time\ndef f():\n    time.sleep(0.2)\n    sys.stdout.write('late')\n"
    assert run_program(f"{code}threading.Thread(target=f).start()", config=either).stdout == "late"


def test_pools_of_processes_work(isolated: None) -> None:
    code = "from multiprocessing import Pool\nif __name__ == '__main__':\n    print(Pool(2).map(abs, [-1, 2, -3]))"
    result = run_program(code, config=SandboxConfig(wall_s=30.0))
    assert (result.stdout, result.stderr) == ("[1, 2, 3]\n", "")


def test_packages_can_be_imported_and_not_written(isolated: None, tmp_path: Path) -> None:
    (tmp_path / "numbers_of_mine.py").write_text("seven = 7\n")
    folder = tmp_path
    while folder != Path("/tmp") and folder != Path("/"):
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
        folder = folder.parent
    config = SandboxConfig(wall_s=20.0, packages=(str(tmp_path),))
    code = "import numbers_of_mine, sys\nprint(numbers_of_mine.seven)\nopen(sys.path[1] + '/x', 'w')"
    result = run_program(code, config=config)
    assert result.stdout == "7\n"
    assert "Read-only file system" in result.stderr
    assert str(tmp_path) not in result.stderr


def test_packages_that_cannot_be_read_are_refused(system_python: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sandbox\.packages"):
        run_program("1", config=SandboxConfig(packages=("relative",)))
    if os.geteuid() == 0:
        tmp_path.chmod(0o700)
        with pytest.raises(ConfigError, match="as whom programs run"):
            run_program("1", config=SandboxConfig(packages=(str(tmp_path),)))


def test_results_come_in_order(either: SandboxConfig) -> None:
    codes = [f"import time\ntime.sleep({0.5 if number == 0 else 0})\nprint({number})" for number in range(8)]
    found = list(run_programs((Program(code=code) for code in codes), config=either, at_once=3))
    assert [result.stdout for result in found] == [f"{number}\n" for number in range(8)]


def test_limits_hold_without_namespaces(system_python: None) -> None:
    config = SandboxConfig(isolation="limits_only", wall_s=20.0, memory_bytes=200_000_000, output_bytes=1000, cpu_s=0.3)
    assert "MemoryError" in run_program("bytearray(10**9)", config=config).stderr
    assert run_program("while True: print(1)", config=config).status == "output_limit"
    assert run_program("while True: pass", config=config).status == "timeout"
    quick = config.model_copy(update={"wall_s": 1.0})
    assert run_program("import time\ntime.sleep(1000)", config=quick).status == "timeout"


def test_without_namespaces_the_environment_is_still_cleared(
    system_python: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LARGEKD_SECRET", "sk-secret")
    result = run_program(
        "import os\nprint('LARGEKD_SECRET' in os.environ)", config=SandboxConfig(isolation="limits_only", wall_s=20.0)
    )
    assert result.stdout == "False\n"


# ---- refusals: on every machine --------------------------------------------------------------------------------------


def _forbid_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(programs, "run_process", fail)


@pytest.fixture
def untried() -> None:
    """What was found out before is forgotten, before the test and after it."""
    availability._tried.cache_clear()


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    _forbid_starting(monkeypatch)
    monkeypatch.setattr(availability.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"sandbox\.isolation=namespaces.*install bubblewrap.*limits_only"):
        # The interpreter was found before; only bubblewrap is missing now.
        _refused_without(monkeypatch)
    availability._tried.cache_clear()


def _refused_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "interpreter", lambda python: None)
    run_program("print(1)", config=SandboxConfig())


def test_where_the_kernel_refuses_nothing_runs(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    _forbid_starting(monkeypatch)
    monkeypatch.setattr(availability.shutil, "which", lambda name: name)

    def refuse(*_: object, **__: object) -> None:
        raise process.StartError("bwrap: No permissions to create new namespace")

    monkeypatch.setattr(availability, "run_process", refuse)
    with pytest.raises(ConfigError, match="No permissions to create new namespace"):
        run_program("print(1)", config=SandboxConfig())
    availability._tried.cache_clear()


def test_an_unknown_processor_is_refused(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    monkeypatch.setattr(availability.platform, "machine", lambda: "riscv64")
    assert "no system-call filter for riscv64" in str(availability.isolation_available())
    availability._tried.cache_clear()


def test_bubblewraps_own_words_are_passed_on(isolated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SandboxConfig(wall_s=20.0)
    run_program("1", config=config)
    monkeypatch.setattr(process, "bubblewrap_command", lambda *_, **__: ["bwrap", "--no-such-option", "--"])
    with pytest.raises(GenerationError, match="--no-such-option"):
        run_program("1", config=config)


def test_interpreters_that_are_refused(system_python: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"sandbox\.python.*no program"):
        run_program("1", config=SandboxConfig(python="/no/python"))
    with pytest.raises(ConfigError, match="does not answer as a Python"):
        run_program("1", config=SandboxConfig(python="/bin/false"))
    # A link by a name of its own: what was found out about an interpreter is remembered by name.
    link = tmp_path / "python"
    link.symlink_to("/usr/bin/python3")
    monkeypatch.setenv("HOME", "/usr")
    with pytest.raises(ConfigError, match="home folder"):
        run_program("1", config=SandboxConfig(python=str(link)))
