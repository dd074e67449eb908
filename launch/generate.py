"""Let a model write training data: reasoning, programs, instructions, conversations."""

import os
import signal
import sys
from typing import TYPE_CHECKING

from cli import RunParser, exit_status

if TYPE_CHECKING:
    from pydantic import BaseModel

USAGE = """deepspeed launch/generate.py --config FILE [key=value ...] [--answers-only]
       python launch/generate.py --config FILE [key=value ...]                         one rank
       python launch/generate.py --config FILE [key=value ...] --dry-run"""


def main(argv: list[str]) -> None:
    """Parse, then show or write."""
    parser = RunParser(description=__doc__, usage=USAGE, record=record)
    parser.add_argument("--dry-run", action="store_true", help="show the first prompts and estimates, and stop")
    parser.add_argument("--answers-only", action="store_true", help="leave curation to tools/curate.py")
    given = parser.read(argv)
    if not given.dry_run:
        from largekd.runtime.shutdown import end_with_launcher

        end_with_launcher()
    from largekd.config.generate import GenerateConfig
    from largekd.config.load import load_record

    config = load_record(GenerateConfig, path=given.config, overrides=given.overrides)
    if given.dry_run:
        from largekd.factory.preview import preview

        text = preview(config)
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(f"{text}\n")
        return

    from largekd.runtime.build_lock import require_buildable_ops

    # Asked again where the ops are loaded; here the answer comes before the long imports.
    require_buildable_ops()
    from largekd.factory.run import generate

    if generate(config, curate=not given.answers_only) is None:
        # The launcher, which signals one rank after another, may yet signal this one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def record() -> "type[BaseModel]":
    """What the file holds."""
    from largekd.config.generate import GenerateConfig

    return GenerateConfig


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:])))
