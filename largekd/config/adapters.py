"""The self-shared teacher: one frozen backbone, adapters for both models, pruning masks for the student."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class AdaptersConfig(Frozen):
    """Low-rank maps beside frozen matrices: W·x + scale·B·A·x, one pair (A, B) for each of the two models."""

    pattern: str = Field(
        r"\.(q|v|up)_proj$", description="Regular expression, searched in the names of the backbone's linear layers."
    )
    rank: int = Field(8, ge=1, description="Rank of the teacher's adapters, and of the student's at the start.")
    max_rank: int | None = Field(None, ge=1, description="Largest rank of a student's adapter; null: `rank`.")
    growth: int = Field(
        1, ge=1, description="Ranks that the more salient half of the student's adapters gets at each pruning update."
    )
    scale: float = Field(2.0, gt=0, description="Factor of B·A.")

    @property
    def largest_rank(self) -> int:
        """The rank that a student's adapter has room for."""
        return self.rank if self.max_rank is None else self.max_rank


class PruningConfig(Frozen):
    """How much of the student is pruned, and when.

    At the share x of the span that is done a target s has reached s·(1 − (1 − x)³).
    """

    neurons: float = Field(0.0, ge=0, lt=1, description="Target share of MLP neurons, the same in every layer.")
    head_groups: float = Field(
        0.0, ge=0, lt=1, description="Target share of key-value heads, each with its query heads, in every layer."
    )
    layers: float = Field(0.0, ge=0, lt=1, description="Target share of whole decoder layers.")
    begin_frac: float = Field(0.0, ge=0, lt=1, description="Share of the run after which pruning begins.")
    end_frac: float = Field(0.8, gt=0, le=1, description="Share of the run after which the targets are reached.")
    every_steps: int = Field(10, ge=1, description="Steps from one update of masks and ranks to the next.")
    salience_decay: float = Field(0.85, ge=0, lt=1, description="Share of a unit's salience that a step keeps.")


class SelfSharedTeacherConfig(Frozen):
    """The student's own frozen backbone with adapters of its own; both models learn (arXiv 2401.12200).

    `student.model` names the backbone. μ of L = μ·L_distill + (1 − μ)·L_task is objective.alpha, the layers that are
    compared are objective.features.
    """

    kind: Literal["self_shared"] = Field(description="Where the signal comes from.")
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig, description="Low-rank maps of both models.")
    pruning: PruningConfig = Field(default_factory=PruningConfig, description="The student's masks.")
