"""Distil a student from a teacher, both sharded by DeepSpeed ZeRO-3."""

import os
import signal
import sys
from typing import TYPE_CHECKING

from cli import RunParser, exit_status

if TYPE_CHECKING:
    from largekd.config.run import RunConfig

USAGE = """deepspeed launch/train.py --config FILE [key=value ...]
       python launch/train.py --config FILE [key=value ...]                            one rank
       python launch/train.py --config FILE [key=value ...] --dry-run [--world-size N]"""


def main(argv: list[str]) -> None:
    """Parse, then plan or run."""
    parser = RunParser(description=__doc__, usage=USAGE)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and the memory plan, and stop"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks that --dry-run plans for; 1 if not given")
    given = parser.read(argv)
    world_size = given.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    if world_size < 1:
        parser.error(f"--world-size {world_size}: must be at least 1")

    if not given.dry_run:
        from largekd.runtime.shutdown import end_with_launcher

        end_with_launcher()
    from largekd.config.load import load_config

    config = load_config(given.config, overrides=given.overrides)
    if given.dry_run:
        dry_run(config, world_size=world_size)
        return

    from largekd.runtime.build_lock import require_buildable_ops

    # Asked again where the ops are loaded; here the answer comes before the long imports.
    require_buildable_ops()
    from largekd.distillation.run import distill

    if distill(config) is None:
        # Stopped and saved: the launcher, which signals one rank after another, may yet signal this one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def dry_run(config: "RunConfig", *, world_size: int) -> None:
    """Print the resolved configuration and the plan; no weights and no torch are loaded."""
    from largekd.config.render import render_config
    from largekd.planner.report import plan_text

    text = plan_text(config, world_size=world_size)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(f"{render_config(config)}\n{text}\n")


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:])))
