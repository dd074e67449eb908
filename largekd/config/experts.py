"""How experts are made of MLPs, of other experts, or MLPs of experts."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class ExpertsConfig(Frozen):
    """First weights where teacher and student differ in their experts; which keys count follows from the two shapes."""

    from_dense: Literal["copy", "split"] = Field(
        "copy",
        description="Experts of a dense teacher: each a copy of the MLP, or of one slice of its neurons (as many "
        "slices as its width is a multiple of the experts').",
    )
    router_std: float = Field(
        0.02, ge=0, description="Standard deviation of the new router of a dense teacher's student; 0: all equal."
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="Noise on the experts of a dense teacher's student, as a multiple of each tensor's own standard "
        "deviation; 0 keeps the teacher's function.",
    )
    fewer: Literal["merge", "most_used"] | tuple[int, ...] = Field(
        "merge",
        description="Fewer experts than the teacher: averages of experts whose routers agree, those that get most of "
        "the router's weight, or the ones with these indices.",
    )
    to_dense: Literal["average", "most_used", "concatenate"] = Field(
        "average",
        description="A dense student of a mixture: the experts' weighted average, the most used one, or the neurons "
        "of the most used ones side by side.",
    )
