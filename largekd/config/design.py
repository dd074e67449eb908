"""A student's shape, computed from the teacher's and a target."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen

Keep = Literal["depth", "width", "balanced"]
Storage = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Deployment = Literal["edge", "mobile", "browser", "server"]

TARGETS = ("ratio", "parameters", "memory_bytes", "deploy")
"""At most one of these is given."""

PINS = ("layers", "width", "heads", "kv_heads", "mlp_width", "experts")
"""Without a target the student is the teacher but for these."""


class DesignConfig(Frozen):
    """The student's shape: the teacher's family at a target size, or with some of its sizes given."""

    ratio: float | None = Field(None, gt=0, description="Parameters of the student over the teacher's.")
    parameters: int | None = Field(None, ge=1, description="Parameters of the student.")
    memory_bytes: int | None = Field(None, ge=1, description="Bytes of weights and of one sequence's keys and values.")
    deploy: Deployment | None = Field(None, description="Where the student will run: a budget of bytes and a dtype.")
    keep: Keep = Field(
        "balanced", description="depth: as many layers as the teacher, narrower; width: as wide, fewer layers."
    )
    counted: Literal["total", "active"] = Field(
        "total", description="What ratio and parameters count of a mixture: all, or what one token meets."
    )
    storage: Storage | None = Field(
        None, description="How the deployed weights are stored, for memory_bytes; null: bf16, or that of deploy."
    )
    context_tokens: int | None = Field(
        None, ge=1, description="Tokens whose keys and values are in the budget; null: 2048, or that of deploy."
    )
    layers: int | None = Field(None, ge=1, description="Layers of the student; null: by the target.")
    width: int | None = Field(None, ge=1, description="Hidden size of the student; null: by the target.")
    heads: int | None = Field(None, ge=1, description="Query heads; null: in proportion to the width.")
    kv_heads: int | None = Field(None, ge=1, description="Key and value heads; null: as many queries to one as before.")
    mlp_width: int | None = Field(
        None, ge=1, description="Width of the MLP, or of each expert; null: in proportion to the width."
    )
    experts: int | None = Field(
        None, ge=0, description="Experts of each layer; 0: a dense student of a mixture; null: as the teacher."
    )
    active_experts: int | None = Field(
        None, ge=1, description="Experts that one token meets; null: as the teacher, or 2."
    )
    tied: bool | None = Field(None, description="One matrix for embedding and head; null: as the teacher.")
    tolerance: float = Field(
        0.1, gt=0, description="Largest accepted |achieved / target - 1| of ratio and parameters; else an error."
    )
