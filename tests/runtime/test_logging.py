"""Log lines: rank, level, quiet libraries, hidden secrets."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import pytest

from largekd.runtime.logging import RedactingFilter, configure_logging, redact, write_line

LIBRARIES = ("DeepSpeed", "transformers", "datasets", "huggingface_hub")
SECRET = "Zx81" * 6


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what configure_logging changes for the whole process."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    loggers = [logging.getLogger(name) for name in (None, "largekd", "py.warnings", *LIBRARIES)]
    state = [(one, one.level, list(one.handlers), list(one.filters), one.propagate) for one in loggers]
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)
    logging.captureWarnings(False)
    for one, level, handlers, filters, propagate in state:
        one.setLevel(level)
        one.handlers[:], one.filters[:], one.propagate = handlers, filters, propagate


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'Basic {SECRET}', 'accept': '*/*'}}",
        f'"Authorization":"{SECRET}"',
        f"sent bearer {SECRET}.",
        f"HF token hf_{SECRET} was used",
        f"key=sk-{SECRET}",
        f"sk-proj-{SECRET}",
        f"OPENAI_API_KEY={SECRET}",
        f'"api-key": "{SECRET}"',
        f"https://user:{SECRET}@example.org/v1",
    ],
)
def test_secrets_are_hidden(text: str):
    assert "Zx81" not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "writing runs/hf_checkpoint_folder and hf_smollm2",
        "task-oriented disk-usage sk-1",
        "teacher.api_key_env=KEY_NAME",
        "https://example.org:8000/v1 at host:1@2",
        "the bearer of news",
        "author: Jane",
    ],
)
def test_ordinary_text_is_left_alone(text: str):
    assert redact(text) == text


def test_rank_zero_shows_messages_with_rank_time_and_level():
    stream = io.StringIO()
    configure_logging(level="info", rank=0, stream=stream)
    logger = logging.getLogger("largekd.test")
    logger.info("step %d", 7)
    logger.debug("hidden")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("[rank 0] ") and line.endswith("INFO largekd.test: step 7")


@pytest.mark.parametrize(("level", "shown"), [("info", ["warning", "error"]), ("error", ["error"])])
def test_other_ranks_show_only_warnings(level, shown: list[str]):
    stream = io.StringIO()
    configure_logging(level=level, rank=3, stream=stream)
    logger = logging.getLogger("largekd.test")
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)(name)
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == shown
    assert "[rank 3]" in stream.getvalue()


def test_configuring_again_replaces_and_keeps_foreign_handlers():
    foreign = logging.NullHandler()
    logging.getLogger().addHandler(foreign)
    first, second = io.StringIO(), io.StringIO()
    configure_logging(level="info", rank=0, stream=first)
    configure_logging(level="info", rank=0, stream=second)
    logging.getLogger("largekd").info("once")
    assert first.getvalue() == "" and second.getvalue().count("once") == 1
    assert foreign in logging.getLogger().handlers


def test_libraries_are_quiet_and_use_our_format():
    own = io.StringIO()
    library = logging.getLogger("DeepSpeed")
    library.propagate = False
    library.addHandler(logging.StreamHandler(own))
    library.setLevel(logging.INFO)
    stream = io.StringIO()
    configure_logging(level="info", rank=0, stream=stream)
    for name in ("DeepSpeed", "transformers.modeling_utils", "datasets", "httpx"):
        logging.getLogger(name).info("chatter")
        logging.getLogger(name).warning("from %s", name)
    assert own.getvalue() == "" and "chatter" not in stream.getvalue()
    assert stream.getvalue().count("[rank 0]") == 4
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "warning"

    configure_logging(level="info", rank=1, stream=stream)
    stream.truncate(0)
    logging.getLogger("DeepSpeed").warning("said by every rank")
    assert stream.getvalue() == ""
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1"


def test_debug_shows_libraries():
    stream = io.StringIO()
    configure_logging(level="debug", rank=0, stream=stream)
    logging.getLogger("transformers").info("loading")
    logging.getLogger("largekd").debug("detail")
    assert "loading" in stream.getvalue() and "detail" in stream.getvalue()


def test_messages_arguments_tracebacks_and_late_handlers_are_redacted():
    stream, late = io.StringIO(), io.StringIO()
    configure_logging(level="info", rank=0, stream=stream)
    logger = logging.getLogger("largekd.test")
    logger.warning("header %s", {"Authorization": f"Bearer {SECRET}"})
    try:
        raise ValueError(f"refused sk-{SECRET}")
    except ValueError:
        logger.exception("call failed")
    # As a library that is imported after configure_logging; its modules' loggers pass their records up to it.
    logging.getLogger("transformers").addHandler(logging.StreamHandler(late))
    logging.getLogger("transformers.hub").warning("token hf_%s", SECRET)
    assert "ValueError: refused sk-***" in stream.getvalue() and "call failed" in stream.getvalue()
    assert "hf_***" in late.getvalue()
    assert "Zx81" not in stream.getvalue() + late.getvalue()


def test_a_message_whose_arguments_do_not_fit_is_shown_not_raised():
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "%d steps", (f"sk-{SECRET}",), None)
    assert RedactingFilter().filter(record)
    assert record.getMessage() == "%d steps (its arguments do not fit: ('sk-***',))"


def test_configuring_twice_redacts_once():
    configure_logging(level="info", rank=0, stream=io.StringIO())
    factory = logging.getLogRecordFactory()
    configure_logging(level="info", rank=0, stream=io.StringIO())
    assert logging.getLogRecordFactory() is factory


def test_python_warnings_become_messages():
    stream = io.StringIO()
    with warnings.catch_warnings():
        configure_logging(level="info", rank=0, stream=stream)
        warnings.simplefilter("always")
        warnings.warn("old way", UserWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert "[rank 0]" in stream.getvalue() and "old way" in stream.getvalue()


def test_default_stream_is_the_standard_error_of_the_moment(capsys: pytest.CaptureFixture[str]):
    configure_logging(level="info", rank=0)
    logging.getLogger("largekd").info("to stderr")
    captured = capsys.readouterr()
    assert "to stderr" in captured.err and captured.out == ""


def test_lines_do_not_tear_a_bar_apart():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    from tqdm import tqdm

    terminal = Terminal()
    configure_logging(level="info", rank=0, stream=terminal)
    with tqdm(total=3, file=terminal, mininterval=0) as bar:
        bar.update(1)
        logging.getLogger("largekd").info("between")
    before = terminal.getvalue().split("[rank 0]")[0]
    # tqdm clears its line before the message: the message starts on an empty one.
    assert before.rsplit("\r", 1)[1].strip() == ""
    assert "between\n" in terminal.getvalue()


def test_write_line_goes_to_standard_output_without_secrets(capsys: pytest.CaptureFixture[str]):
    write_line(f"done, hf_{SECRET}")
    assert capsys.readouterr().out == "done, hf_***\n"
    assert sys.stdout is not None


def test_filter_lets_every_record_pass():
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "plain %s", ("text",), None)
    assert RedactingFilter().filter(record)
    assert record.getMessage() == "plain text"
