"""What the launchers share: the command line of a run, its help, and how a user's error is told."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from pydantic import BaseModel

USER_ERROR = 2

# A launcher also works from a checkout that is not installed.
if importlib.util.find_spec("largekd") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class RunParser(argparse.ArgumentParser):
    """`--config FILE [key=value ...]`; options and overrides may come in any order."""

    def __init__(self, *, description: str, usage: str, record: "Callable[[], type[BaseModel]] | None" = None) -> None:
        """record: gives the file's record for --help; None: a run's."""
        self._record = record
        super().__init__(description=description, usage=usage, add_help=False, allow_abbrev=False)
        self.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file: train.seed=1")
        self.add_argument("--config", metavar="FILE", help="the run's YAML file, see recipes/README.md")
        self.add_argument("-h", "--help", action="store_true", help="show this text and every key")
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    def read(self, argv: list[str]) -> argparse.Namespace:
        """The arguments; leaves the process after --help and after a mistake."""
        given = self.parse_intermixed_args(argv)
        if given.help:
            from largekd.config.schema import key_reference

            keys = key_reference(self._record()) if self._record else key_reference()
            sys.stdout.write(f"{self.format_help()}\nkeys of the file, and of key=value:\n\n{keys}\n")
            raise SystemExit(0)
        if given.config is None:
            self.error("--config FILE is missing")
        return given

    def error(self, message: str) -> NoReturn:
        """Every rank leaves, one speaks."""
        raise SystemExit(_refuse(f"{message}; see --help"))


def exit_status(run: Callable[[], None]) -> int:
    """0 when `run` returns, 2 after an error that the user can mend; its message is told once, without a traceback."""
    from largekd.errors import LargeKDError

    try:
        run()
    except LargeKDError as error:
        from largekd.runtime.logging import redact

        return _refuse(redact(str(error)), only_here=error.only_here)
    return 0


def _refuse(message: str, *, only_here: bool | None = None) -> int:
    rank = os.environ.get("RANK", "0")
    if only_here is None:
        only_here = os.environ.get("LOCAL_RANK") == "0"
    if rank == "0" or only_here:
        who = "" if rank == "0" else f" (rank {rank})"
        sys.stderr.write(f"{Path(sys.argv[0]).name}{who}: {message}\n")
    return USER_ERROR
