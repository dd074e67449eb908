"""Losses of intermediate layers of the student, read through its own final norm and vocabulary head."""

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.schedule import Scheduled


class DeepSupervisionConfig(Frozen):
    """Layers that are trained on everything that the last one is: cross-entropy and divergences, same signal."""

    layers: tuple[int, ...] = Field(min_length=1, description="Student layers (0 is the first), without the last one.")
    weight: Scheduled = Field(0.1, description="Multiplies the loss of each of these layers.")
