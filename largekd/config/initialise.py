"""How a student of another shape takes its first weights from the teacher."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.experts import ExpertsConfig


class InitialiseConfig(Frozen):
    """First weights of a student whose shape comes from `student.config` or `student.design`."""

    layers: Literal["uniform", "first", "first_last", "block_influence"] | tuple[int, ...] = Field(
        "uniform", description="The teacher's layers that are kept: a rule, or their indices."
    )
    width: Literal["truncate", "interpolate", "importance", "pca"] = Field(
        "truncate", description="How hidden units, neurons and heads are reduced."
    )
    gain: float = Field(
        0.0,
        ge=0,
        le=1,
        description="truncate, interpolate: weights that read an axis of length m shortened to n are multiplied by "
        "(m / n) ** gain.",
    )
    experts: ExpertsConfig = Field(
        ExpertsConfig(), description="Where teacher and student differ in their experts; see each key."
    )
    calibration_rows: int = Field(
        64, ge=1, description="Rows of data.train on which activations are measured, by the rules that need some."
    )
