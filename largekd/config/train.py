"""How the run is driven: batch, length, precision, optimizer, schedule."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class TrainConfig(Frozen):
    """The optimizer step and the loop around it."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of data order, initialisation and dropout.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps to run; null: until max_epochs are done.")
    max_epochs: int | None = Field(None, ge=1, description="Passes over the data; null: until max_steps are done.")
    global_batch_size: int = Field(ge=1, description="Rows (packed or padded) per optimizer step over all ranks.")
    micro_batch_size: int = Field(ge=1, description="Rows per forward pass on one rank.")
    sequence_length: int = Field(ge=2, description="Positions in a row.")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Dtype of weights and compute of both models.")
    activation_checkpointing: bool = Field(False, description="Recompute the student's blocks in the backward pass.")
    gradient_clipping: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 turns clipping off.")
    max_skipped_steps: int = Field(5, ge=1, description="Non-finite steps in a row after which the run aborts.")
    collective_timeout_s: int = Field(1800, ge=5, description="Seconds after which a silent rank counts as hung.")


class GroupConfig(Frozen):
    """A learning-rate group: the parameters whose name the pattern finds, unless an earlier group claimed them."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name in logs, `optim/lr/<name>`.")
    pattern: str = Field(description="Regular expression, searched in the student's parameter names.")
    lr_multiplier: float = Field(1.0, ge=0, description="Factor on optim.lr; 0 freezes the group.")
    weight_decay: float | None = Field(
        None, ge=0, description="For all of the group, biases and norms too; null: optim.weight_decay, without those."
    )
    betas: tuple[float, float] | None = Field(None, description="Overrides optim.betas.")
    eps: float | None = Field(None, gt=0, description="Overrides optim.eps.")


class OptimConfig(Frozen):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator term.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled decay of all but biases and norms.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up to the peak.")
    min_lr_frac: float = Field(0.1, ge=0, le=1, description="Fraction of the peak at the last step.")
    implementation: Literal["torch", "deepspeed"] = Field(
        "torch",
        description="torch: bit-exact resume everywhere. deepspeed: its fused GPU or CPU Adam, fast with CPU offload.",
    )
    groups: tuple[GroupConfig, ...] = Field((), description="Learning-rate groups; the first match wins.")
    strict: bool = Field(False, description="A trainable parameter that no group claims is an error.")
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Factor on the rate per layer below the top: layer i of L learns at layer_decay^(L-1-i), "
        "embeddings at layer_decay^L, what is behind the layers at 1; times the group's own factor. null: none.",
    )
