"""What the router of a mixture-of-experts student is asked for."""

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.schedule import Scheduled


class RouterDistillConfig(Frozen):
    """The student's routing follows that of a mixture-of-experts teacher: KL(teacher's experts ‖ student's experts)."""

    weight: Scheduled = Field(1.0, description="Weight of the term.")
    pairs: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="Student layer and teacher layer that are compared; null: all of the student's layers with a "
        "router, each with the teacher's layer it was made of, else with the one at the same depth.",
    )
    expert_map: tuple[int, ...] | str | None = Field(
        None,
        description="For each expert of the model with more of them (the teacher, where both have as many) the one of "
        "the other model, -1: none. A path: a JSON file with such a list per student layer. null: the same experts.",
    )


class RouterConfig(Frozen):
    """Terms over the router logits of a mixture-of-experts student; each weight 0 switches its term off.

    With all of them off the router's figures are recorded all the same.
    """

    balance: Scheduled = Field(0.01, description="Weight of the load-balance loss; it is 1 where loads are equal.")
    z: Scheduled = Field(0.001, description="Weight of the z loss, the mean squared log-sum-exp of router logits.")
    distil: RouterDistillConfig | None = Field(None, description="Follow a teacher's router; null: do not.")
