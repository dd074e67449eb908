"""Which of the teacher's layers the student's layers were made of."""

from pathlib import Path

from transformers import PretrainedConfig

from largekd.config.run import RunConfig
from largekd.distillation.default_rules import layers_rule
from largekd.errors import ConfigError
from largekd.initialisation.kinds import choose_layers
from largekd.initialisation.report import REPORT_FILE, shape_of
from largekd.models.source import ModelFolder
from largekd.runtime.files import read_json


def kept_layers(config: RunConfig, *, teacher: ModelFolder) -> tuple[int, ...] | None:
    """The teacher's layer of each of the student's, once the student is built; None where it is made of
    no teacher, or of one of another shape.

    Of student.initialise this is in the run's initialisation.json, in a resumed run and in later stages too; these may
    have another teacher. The folder's name does not count: a model may move between two starts. Errors: ConfigError
    when that file is lost.
    """
    if config.student.initialise is None:
        return config.student.teacher_layers
    path = report_folder(config) / REPORT_FILE
    try:
        plan = read_json(path)["plan"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); it says which layers of the teacher the student was made of. Restore "
            "it, or start anew with run.fresh=true."
        ) from error
    return tuple(plan["layers"]) if plan.get("teacher_shape") == shape_of(teacher.config) else None


def planned_layers(
    config: RunConfig, *, teacher: PretrainedConfig, student: PretrainedConfig
) -> tuple[int, ...] | None:
    """The same before anything is built; None also where the layers are chosen by a measurement."""
    initialise = config.student.initialise
    if initialise is None:
        return config.student.teacher_layers
    rule = layers_rule(initialise, teacher=teacher, student=student)
    return None if rule == "block_influence" else choose_layers(rule, teacher=teacher, student=student)


def report_folder(config: RunConfig) -> Path:
    """Where the run says what its student was made of: its own folder, whatever the stage."""
    return Path(config.run.dir).expanduser().absolute()
