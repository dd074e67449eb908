"""Progressive freezing: blocks of the student's layers that stop, or begin, to learn one after another."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class FreezingConfig(Frozen):
    """The layers are cut into `parts` blocks and the run into as many phases; a phase is a stage of its own.

    freeze: nothing is frozen in the first phase, all blocks but the last one in the last. unfreeze: the first block
    learns alone in the first phase, all of them in the last. The head, the final norm and projectors always learn.
    """

    order: Literal["bottom_up", "top_down"] = Field("bottom_up", description="Which end the blocks are counted from.")
    mode: Literal["freeze", "unfreeze"] = Field("freeze", description="Whether blocks stop or begin to learn.")
    parts: int = Field(ge=2, description="Blocks of layers, and phases.")
    at: tuple[float, ...] | None = Field(
        None, description="Shares of the steps at which phases change, `parts` - 1 of them; null: even."
    )
    embeddings: bool = Field(True, description="Freeze the embedding look-up together with the lowest block.")
