"""Store what a sharded teacher says about a run's data, so that runs need the teacher no more."""

import signal
import sys

from cli import RunParser, exit_status

USAGE = """deepspeed launch/cache_teacher.py --config FILE [--stage NAME] [key=value ...]
       python launch/cache_teacher.py --config FILE [--stage NAME] [key=value ...]     one rank"""


def main(argv: list[str]) -> None:
    """Parse, then make the cache."""
    parser = RunParser(description=__doc__, usage=USAGE)
    parser.add_argument("--stage", metavar="NAME", help="of a run in stages, the one whose rows to store; the first")
    given = parser.read(argv)
    from largekd.runtime.shutdown import end_with_launcher

    end_with_launcher()
    from largekd.config.load import load_config

    config = load_config(given.config, overrides=given.overrides)
    from largekd.runtime.build_lock import require_buildable_ops

    # Asked again where the ops are loaded; here the answer comes before the long imports.
    require_buildable_ops()
    from largekd.distillation.caching import cache_teacher

    if cache_teacher(config, stage=given.stage) is None:
        # The launcher, which signals one rank after another, may yet signal this one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:])))
