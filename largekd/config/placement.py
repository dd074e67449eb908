"""Reading ds_configs files: where the teacher's and the student's weights live."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from largekd.config.placement_schema import PlacementConfig, forbidden
from largekd.config.problems import problems
from largekd.config.run import RunConfig
from largekd.config.teacher import EMATeacherConfig, MixtureTeacherConfig, OnlineTeacherConfig, TeacherConfig
from largekd.errors import ConfigError

_CHECKOUT = Path(__file__).resolve().parents[2]
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
_OFFLOADS = ("offload_param", "offload_optimizer")


class Placements(NamedTuple):
    """Each model's placement, ready to be merged with the keys that the run configuration owns.

    teachers: by the key of the configuration that names the file (`teacher.deepspeed`, `teacher.members.0.teacher…`);
    empty where no teacher has weights in this job.
    """

    teachers: dict[str, dict[str, Any]]
    student: dict[str, Any]

    @property
    def teacher(self) -> dict[str, Any] | None:
        """The placement of a single teacher; None where it has no weights in this job."""
        return self.teachers.get("teacher.deepspeed")


def read_placements(config: RunConfig) -> Placements:
    """All placement files of a run, checked against each other and against the run's other keys.

    Each model of each run swaps to a folder of its own below `nvme_path`: DeepSpeed empties its swap folder when it
    starts, whoever else is using it.
    Errors: ConfigError.
    """
    student = read_placement(config.student.deepspeed, key="student.deepspeed")
    _check_resumable(config, student=student)
    run = Path(config.run.dir).expanduser().absolute()
    own = f"{run.name}-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}"
    teachers = {}
    for index, (key, path) in enumerate(_teacher_files(config.teacher)):
        teacher = read_placement(path, key=key)
        if teacher["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
            raise ConfigError(
                f"{key} = {path!r} sets zero_optimization.zero_hpz_partition_size: "
                "DeepSpeed cannot build an engine without an optimizer with it. Take the key out of that file."
            )
        teachers[key] = with_swap_folder(teacher, f"{own}/teacher{index or ''}")
    if isinstance(config.teacher, EMATeacherConfig):
        _check_average(config, student=student, teacher=teachers["teacher.deepspeed"])
    return Placements(teachers=teachers, student=with_swap_folder(student, f"{own}/student"))


def _teacher_files(teacher: TeacherConfig) -> Iterator[tuple[str, str]]:
    """(key, file) of every teacher that has weights in this job."""
    match teacher:
        case MixtureTeacherConfig(members=members):
            for index, member in enumerate(members):
                if isinstance(member.teacher, OnlineTeacherConfig):
                    yield f"teacher.members.{index}.teacher.deepspeed", member.teacher.deepspeed
        case OnlineTeacherConfig() | EMATeacherConfig():
            yield "teacher.deepspeed", teacher.deepspeed


def read_placement(path: str, *, key: str) -> dict[str, Any]:
    """The placement in a ds_configs file, as DeepSpeed takes it; `key` is the run key that names the file.

    A relative path is looked up from the current directory, then from the checkout. `${NAME}` and `${NAME:-default}`
    in an `nvme_path` are taken from the environment.
    Errors: ConfigError for a file that is absent or no JSON, and for a key that is unknown or owned elsewhere.
    """
    file = find_placement(path, key=key)
    tree = _read_json(file, key=key)
    placement = _validated(tree, file=file, key=key)
    merged = placement.model_dump(mode="json", exclude_unset=True)
    for name in _OFFLOADS:
        offload = merged["zero_optimization"].get(name)
        if offload and offload.get("nvme_path"):
            offload["nvme_path"] = _expand(offload["nvme_path"], where=f"{file}: zero_optimization.{name}.nvme_path")
    return merged


def find_placement(path: str, *, key: str) -> Path:
    """The file, from the current directory or else from the checkout. Errors: ConfigError naming both tried paths."""
    given = Path(path).expanduser()
    tried = [given.absolute(), _CHECKOUT / given]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"{key} = {path!r}: no such file; looked for "
        + " and ".join(str(place) for place in dict.fromkeys(tried))
        + "."
    )


def offload_device(placement: dict[str, Any], name: str) -> str:
    """`none`, `cpu` or `nvme`; `name` is `offload_param` or `offload_optimizer`."""
    offload = placement["zero_optimization"].get(name)
    return offload["device"] if offload else "none"


def _check_resumable(config: RunConfig, *, student: dict[str, Any]) -> None:
    if offload_device(student, "offload_optimizer") == "nvme" and config.checkpoint.every_steps > 0:
        raise ConfigError(
            f"student.deepspeed = {config.student.deepspeed!r} keeps the optimizer on NVMe, and checkpoint.every_steps "
            f"= {config.checkpoint.every_steps}: DeepSpeed restores neither learning rate nor moments of such an "
            "optimizer, so a resumed run would be wrong without any error. Use offload_optimizer.device cpu "
            "(ds_configs/zero3_cpu.json; parameters may stay on NVMe), or checkpoint.every_steps=0."
        )


def _check_average(config: RunConfig, *, student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Shards on NVMe are not in memory when the average is taken."""
    for key, path, placement in (
        ("student.deepspeed", config.student.deepspeed, student),
        ("teacher.deepspeed", getattr(config.teacher, "deepspeed", ""), teacher),
    ):
        for name in _OFFLOADS:
            if offload_device(placement, name) == "nvme":
                raise ConfigError(
                    f"{key} = {path!r} sets zero_optimization.{name}.device nvme: teacher.kind = 'ema' averages shards "
                    f"that are in memory. Choose a file with {name}.device cpu or none."
                )


def with_swap_folder(placement: dict[str, Any], folder: str) -> dict[str, Any]:
    moved = deepcopy(placement)
    for name in _OFFLOADS:
        if offload_device(moved, name) == "nvme":
            offload = moved["zero_optimization"][name]
            offload["nvme_path"] = str(Path(offload["nvme_path"]) / folder)
    return moved


def _read_json(file: Path, *, key: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{file}, line {error.lineno}, column {error.colno} (named by {key}): not valid JSON ({error.msg})."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} (named by {key}): cannot be read ({error}).") from error


def _validated(tree: Any, *, file: Path, key: str) -> PlacementConfig:
    lines = forbidden(tree)
    try:
        placement = PlacementConfig.model_validate(tree)
    except ValidationError as error:
        # What is forbidden is also unknown to the record; it is reported once.
        told = {_key_of(line) for line in lines}
        found = problems(error, record=PlacementConfig, data=tree) if isinstance(tree, dict) else []
        lines += [line for line in found if _key_of(line) not in told]
        raise ConfigError(_together(lines, file=file, key=key)) from None
    if lines:
        raise ConfigError(_together(lines, file=file, key=key))
    return placement


def _key_of(line: str) -> str:
    return re.split(r"[: ]", line, maxsplit=1)[0]


def _together(lines: list[str], *, file: Path, key: str) -> str:
    place = f"{file} (named by {key})"
    return f"{place}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{place}: {len(lines)} problems", *lines])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return tree


def _expand(path: str, *, where: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        value = os.environ.get(match["name"]) or match["default"]
        if not value:
            raise ConfigError(f"{where} = {path!r}: set the environment variable {match['name']} to a folder.")
        return value

    return str(Path(_VARIABLE.sub(value_of, path)).expanduser().absolute())
