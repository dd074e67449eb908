"""How a student of another shape takes its first weights from the teacher."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.experts import ExpertsConfig

LayerRule = Literal["uniform", "first", "first_last", "block_influence"]
WidthRule = Literal["truncate", "interpolate", "importance", "pca"]


class InitialiseConfig(Frozen):
    """First weights of a student whose shape comes from `student.config` or `student.design`."""

    layers: LayerRule | tuple[int, ...] | None = Field(
        None,
        description="The teacher's layers that are kept: a rule, or their indices; null: block_influence for a student "
        "of fewer layers than the teacher, else all.",
    )
    width: WidthRule | None = Field(
        None,
        description="How hidden units, neurons and heads are reduced; null: importance where the student has fewer of "
        "one of them, but truncate where experts are narrower or `gain` is set.",
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
