"""What the router of a mixture-of-experts student is asked for."""

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.schedule import Scheduled


class RouterConfig(Frozen):
    """Terms over the router logits of a mixture-of-experts student; each weight 0 switches its term off."""

    balance: Scheduled = Field(0.01, description="Weight of the load-balance loss.")
    z: Scheduled = Field(0.001, description="Weight of the z loss, the mean squared log-sum-exp of router logits.")
