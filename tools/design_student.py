"""Design a student from a teacher's config.json and a target, and write its config.json.

    python tools/design_student.py assets/smollm2-135m-instruct --ratio 1/4
    python tools/design_student.py assets/smollm2-135m-instruct --ratio 1/2 --compare
    python tools/design_student.py assets/smollm2-135m-instruct --experts 8 --active-experts 2 --output runs/moe
    python tools/design_student.py TEACHER --memory 2GB --storage int4 --keep depth --output runs/student

TEACHER is a folder with a config.json, the file itself, or a hub model in the local cache. The folder that is written
has the tokenizer too, if the teacher's has one, and is what student.config of a recipe names; the options are also
keys of student.design. Exit status 2: an error to mend.
"""

import argparse
import json
import shutil
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from largekd.config.design import Deployment, DesignConfig, Keep, Storage
from largekd.config.load import parse_config
from largekd.config.problems import problems
from largekd.errors import ConfigError, LargeKDError
from largekd.planner.design import Design, design_student
from largekd.planner.design_report import render_design, side_by_side
from largekd.planner.locate import find_model_config, read_model_config
from largekd.planner.plan import plan

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt")
MORE_FILES = ("merges.txt", "chat_template*", "generation_config.json")


def main(argv: list[str] | None = None) -> int:
    """Design, print, and write."""
    given = _parser().parse_args(argv)
    try:
        teacher = read_model_config(given.teacher)
        if given.compare:
            sys.stdout.write(compare(given, teacher=teacher) + "\n")
            return 0
        design = design_student(teacher, design=wanted(given, keep=given.keep), named=option, model=given.teacher)
        sys.stdout.write(render_design(design, teacher=teacher, keep=given.keep) + "\n")
        sys.stdout.write(training_memory(given, design=design) + "\n")
        if given.output is not None:
            write(design, source=find_model_config(given.teacher).parent, folder=given.output)
            sys.stdout.write(f"wrote {given.output}: student.config = {given.output}\n")
    except LargeKDError as error:
        sys.stderr.write(f"design_student.py: {error}\n")
        return 2
    return 0


def compare(given: argparse.Namespace, *, teacher: dict[str, Any]) -> str:
    """The target with every rule of --keep side by side."""
    made: dict[str, Design | str] = {}
    for keep in get_args(Keep):
        try:
            made[keep] = design_student(teacher, design=wanted(given, keep=keep), named=option, model=given.teacher)
        except ConfigError as error:
            made[keep] = str(error)
    return side_by_side(made, teacher=teacher)


def wanted(given: argparse.Namespace, *, keep: str) -> DesignConfig:
    """The options as student.design."""
    fields = {name: getattr(given, name) for name in DesignConfig.model_fields if name not in ("keep", "tied")}
    data = {**fields, "keep": keep, "tied": {"tied": True, "untied": False}.get(given.embedding)}
    try:
        return DesignConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("; ".join(problems(error, record=DesignConfig, data=data))) from error


def option(field: str) -> str:
    """A field of student.design as an option."""
    return {"memory_bytes": "--memory", "tied": "--embedding"}.get(field, f"--{field.replace('_', '-')}")


def training_memory(given: argparse.Namespace, *, design: Design) -> str:
    """The plan of a run that trains this student online, with the placement that the options name."""
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "config.json"
        shape.write_text(json.dumps(design.config), encoding="utf-8")
        config = parse_config(
            {
                "run": {"dir": "runs/plan"},
                "teacher": {"model": given.teacher, "deepspeed": given.teacher_deepspeed},
                "student": {"config": str(shape), "deepspeed": given.deepspeed},
                "data": {"train": "unread.jsonl"},
                "train": {
                    "max_steps": 1,
                    "global_batch_size": given.world_size * given.micro_batch_size,
                    "micro_batch_size": given.micro_batch_size,
                    "sequence_length": given.sequence_length,
                    "precision": "bf16",
                },
                "checkpoint": {"every_steps": 0},
            }
        )
        peaks = plan(config, world_size=given.world_size).peaks
    told = ", ".join(f"{place} {size / 1e9:.2f} GB" for place, size in peaks.items() if size)
    return (
        f"training, bf16, ranks {given.world_size}, rows a rank {given.micro_batch_size} of {given.sequence_length} "
        f"tokens: {told} a rank ({given.deepspeed}, teacher {given.teacher_deepspeed})"
    )


def write(design: Design, *, source: Path, folder: Path) -> None:
    """The student's config.json and the tokenizer of the teacher in the folder `source`.

    Errors: ConfigError where another model already is.
    """
    if folder.resolve() == source.resolve():
        raise ConfigError(f"--output {folder}: the teacher is there; name another folder.")
    if any(folder.glob("*.safetensors")):
        raise ConfigError(f"--output {folder}: there are weights of another shape; name an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(design.config, indent=2) + "\n", encoding="utf-8")
    for pattern in (*TOKENIZER_FILES, *MORE_FILES):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def ratio(text: str) -> float:
    """1/8, 0.125 or 12.5%."""
    percent = text.endswith("%")
    try:
        value = float(Fraction(text.rstrip("%")))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio; write 1/8, 0.125 or 12.5%") from error
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not greater than 0")
    return value / 100 if percent else value


def count(text: str) -> int:
    """1500000, 350M or 1.5B parameters."""
    return _scaled(text.upper(), example="350M or 1.5B")


def size(text: str) -> int:
    """2000000000, 600MB or 2GB."""
    upper = text.upper()
    return _scaled(upper[:-1] if upper[-2:-1] in ("K", "M", "G", "T") else upper, example="600MB or 2GB")


def _scaled(text: str, *, example: str) -> int:
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        value = round(float(text[: len(text) - len(unit)].replace("_", "")) * UNITS[unit])
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write {example}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", metavar="TEACHER", help="folder, config.json, or hub model in the local cache")
    target = parser.add_argument_group("target, at most one")
    target.add_argument("--ratio", type=ratio, metavar="R", help="parameters over the teacher's: 1/8, 0.125, 12.5%%")
    target.add_argument("--parameters", type=count, metavar="N", help="350M, 1.5B")
    target.add_argument("--memory", dest="memory_bytes", type=size, metavar="SIZE", help="600MB, 2GB")
    target.add_argument("--deploy", choices=get_args(Deployment), help="a budget by place; planner/deployment.py")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--keep", choices=get_args(Keep), default="balanced", help="what stays as large as it is")
    shape.add_argument("--counted", choices=("total", "active"), default="total", help="parameters of a mixture")
    shape.add_argument("--storage", choices=get_args(Storage), help="stored weights, for --memory and --deploy")
    shape.add_argument("--context-tokens", type=int, metavar="N", help="keys and values in the budget")
    for name in ("layers", "width", "heads", "kv-heads", "mlp-width", "experts", "active-experts"):
        shape.add_argument(f"--{name}", type=int, metavar="N", help="given instead of computed")
    shape.add_argument("--embedding", choices=("tied", "untied"), help="the teacher's if not given")
    shape.add_argument("--tolerance", type=float, default=0.1, help="largest |achieved / target - 1|")
    training = parser.add_argument_group("training memory")
    training.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (default 1)")
    training.add_argument("--micro-batch-size", type=int, default=1, metavar="N")
    training.add_argument("--sequence-length", type=int, default=1024, metavar="N")
    training.add_argument("--deepspeed", default="ds_configs/zero3.json", help="placement of the student")
    training.add_argument("--teacher-deepspeed", default="ds_configs/teacher_zero3.json", help="of the teacher")
    parser.add_argument("--compare", action="store_true", help="depth, width and balanced side by side; writes nothing")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where config.json and tokenizer are written")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
