"""Why there is no plan."""

from largekd.errors import LargeKDError


class PlanUnavailableError(LargeKDError):
    """A plan needs something that is not on this machine or not known to the planner; the run itself may be fine."""
