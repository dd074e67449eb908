"""Messages of this process: one format with the rank in it, quiet libraries, no secrets."""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Literal, TextIO

Level = Literal["debug", "info", "warning", "error"]

# Libraries that install handlers or set levels of their own. They are made to use ours.
_LIBRARIES = ("DeepSpeed", "transformers", "datasets", "huggingface_hub")

_HIDDEN = "***"
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"""(authorization["']?\s*[:=]\s*["']?)[^"'\n,}]+""", re.IGNORECASE), rf"\g<1>{_HIDDEN}"),
    (re.compile(r"\b(bearer\s+)[\w.~+/=-]{16,}", re.IGNORECASE), rf"\g<1>{_HIDDEN}"),
    (re.compile(r"""(api[_-]?key["']?\s*[:=]\s*["']?)[^\s"',}]+""", re.IGNORECASE), rf"\g<1>{_HIDDEN}"),
    # The length tells a token from a name such as hf_checkpoint.
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), f"hf_{_HIDDEN}"),
    (re.compile(r"\bsk-[\w-]{8,}"), f"sk-{_HIDDEN}"),
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), rf"\g<1>{_HIDDEN}@"),
)


def redact(text: str) -> str:
    """`text` with Authorization values, API keys, `hf_…` and `sk-…` tokens and URL passwords replaced by ***."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class RedactingFilter(logging.Filter):
    """Redacts a record's message, traceback and stack in place; lets every record pass."""

    _formatter = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites `record` in place, as filters may."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            # A filter that raises ends the run; a handler would only complain.
            message = f"{record.msg} (its arguments do not fit: {record.args})"
        record.msg, record.args = redact(message), None
        if record.exc_info and not record.exc_text:
            record.exc_text = self._formatter.formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True


def configure_logging(*, level: Level, rank: int, stream: TextIO | None = None) -> None:
    """Sends all messages of this process to standard error (or `stream`) as `[rank 0] 12:00:00 INFO name: text`.

    Messages of the package show from `level` on rank 0, from warning (or `level`, if that is more severe) on others.
    Libraries show from warning on rank 0 (from info at level debug), from error on others.
    Secrets are hidden when a message is made, whatever handler shows it later. A library that is imported later
    installs its own handlers again: call this once more after heavy imports to give its messages our format. Each call
    replaces what the one before installed.
    """
    if not isinstance(logging.getLogRecordFactory(), _RedactingFactory):
        logging.setLogRecordFactory(_RedactingFactory(logging.getLogRecordFactory()))
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _ConsoleHandler)]:
        root.removeHandler(handler)
    root.addHandler(_ConsoleHandler(rank=rank, stream=stream))
    logging.getLogger("largekd").setLevel(threshold if rank == 0 else max(threshold, logging.WARNING))

    quiet = logging.ERROR if rank else (logging.INFO if level == "debug" else logging.WARNING)
    root.setLevel(quiet)
    logging.captureWarnings(True)
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(quiet)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", logging.getLevelName(quiet).lower())
    if rank:
        for variable in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")


def write_line(text: str) -> None:
    """Writes `text` and a newline to standard output: what a command was asked to show, not a message about it."""
    stream = _BarSafeStream(sys.stdout)
    stream.write(redact(text) + "\n")
    stream.flush()


class _RedactingFactory:
    """Makes records with `make` and redacts them before any logger or handler sees them."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make
        self._filter = RedactingFilter()

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        self._filter.filter(record)
        return record


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Our handler: lines with the rank that do not tear a progress bar apart."""

    def __init__(self, *, rank: int, stream: TextIO | None) -> None:
        super().__init__(_BarSafeStream(stream))  # type: ignore[arg-type]
        self.setFormatter(
            logging.Formatter(f"[rank {rank}] %(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
        )


class _BarSafeStream:
    """A stream that clears tqdm's bars before it writes and draws them again; standard error is looked up late."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        target = self._target()
        # Where tqdm was never imported there is no bar.
        tqdm_module = sys.modules.get("tqdm")
        if tqdm_module is not None and target.isatty():
            tqdm_module.tqdm.write(text, file=target, end="")
        else:
            target.write(text)

    def flush(self) -> None:
        self._target().flush()

    def _target(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream
