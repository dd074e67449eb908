"""The student that student.design asks for, as a Hugging Face configuration."""

import logging
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from largekd.config.design import DesignConfig
from largekd.errors import ConfigError
from largekd.planner.design import design_student
from largekd.planner.errors import PlanUnavailableError
from largekd.planner.locate import read_model_config

logger = logging.getLogger(__name__)


def designed_config(design: DesignConfig, *, teacher: Path, teacher_key: str) -> PretrainedConfig:
    """The shape computed from the teacher's config.json, the same on every rank and in the plan.

    Errors: ConfigError for a target that cannot be met and for a family whose shapes are not known.
    """
    try:
        made = design_student(read_model_config(str(teacher)), design=design, model=teacher_key)
    except PlanUnavailableError as error:
        raise ConfigError(f"student.design: {error}. Write the student's config.json into student.config.") from error
    shape = made.shape
    logger.info(
        "student.design: %d x %d, heads %d/%d, %.1fM parameters, %.3f of the teacher's",
        len(shape.layers),
        shape.width,
        shape.heads,
        shape.kv_heads,
        shape.parameter_count / 1e6,
        made.ratio,
    )
    for note in made.notes:
        logger.info("student.design: %s", note)
    return AutoConfig.for_model(**made.config)
