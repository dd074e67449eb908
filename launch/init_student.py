"""Make the student of a run and write it as a plain Hugging Face folder, without training."""

import sys

from cli import RunParser, exit_status

USAGE = """deepspeed launch/init_student.py --config FILE --output FOLDER [key=value ...]
       python launch/init_student.py --config FILE --output FOLDER [key=value ...]      one rank"""


def main(argv: list[str]) -> None:
    """Parse, then write the student."""
    parser = RunParser(description=__doc__, usage=USAGE)
    parser.add_argument("--output", metavar="FOLDER", help="the student's folder; an earlier student there is replaced")
    given = parser.read(argv)
    if given.output is None:
        parser.error("--output FOLDER is missing")

    from largekd.runtime.shutdown import end_with_launcher

    end_with_launcher()
    from largekd.config.load import load_config

    config = load_config(given.config, overrides=given.overrides)

    from largekd.runtime.build_lock import require_buildable_ops

    require_buildable_ops()
    from largekd.distillation.student_only import write_student

    write_student(config, output=given.output)


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: main(sys.argv[1:])))
