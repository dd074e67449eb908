"""Layers that are left out at random during training."""

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.schedule import Scheduled


class LayerDropConfig(Frozen):
    """Each layer that is not protected is left out of a step with probability `rate`, the same on all ranks."""

    rate: Scheduled = Field(0.1, description="Probability of leaving a layer out.")
    protect: tuple[int, ...] = Field((0, -1), description="Layers that always run; -1 is the last.")
