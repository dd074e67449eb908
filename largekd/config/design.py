"""A student's shape, computed from the teacher's and a target."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class DesignConfig(Frozen):
    """The student's shape: the teacher's family at a target size. Exactly one of the targets is given."""

    ratio: float | None = Field(None, gt=0, lt=1, description="Parameters of the student over the teacher's.")
    parameters: int | None = Field(None, ge=1, description="Parameters of the student.")
    keep: Literal["depth", "width", "balanced"] = Field(
        "balanced", description="depth: as many layers as the teacher, narrower; width: as wide, fewer layers."
    )
