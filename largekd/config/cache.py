"""What launch/cache_teacher.py stores of a teacher."""

from typing import Annotated, Literal

from pydantic import Field

from largekd.config.common import Frozen


class TopKCodecConfig(Frozen):
    """The teacher's likeliest ids (the label always among them) and the mass of all others, quantised."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(64, ge=1, description="Ids that are kept per token.")
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), description="Temperatures that the mass of the other ids is stored for; 1 always is."
    )


class SampledCodecConfig(Frozen):
    """Ids drawn from the teacher with importance weights; every epoch sees the same draws."""

    kind: Literal["sampled"]
    draws: int = Field(12, ge=1, description="Draws per token.")
    proposal_power: float = Field(1.0, gt=0, le=1, description="Draws come from probabilities to this power.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the distribution that is drawn from.")
    seed: int = Field(0, ge=0, description="Seed of the draws.")


class HiddenCodecConfig(Frozen):
    """Last hidden states in the teacher's dtype, and its vocabulary head once: the whole distribution."""

    kind: Literal["hidden"]


CodecConfig = Annotated[TopKCodecConfig | SampledCodecConfig | HiddenCodecConfig, Field(discriminator="kind")]


class CachedTapsConfig(Frozen):
    """The teacher's layers that objective.features and objective.attention compare, stored at every position."""

    precision: Literal["bf16", "fp32"] = Field("bf16", description="Dtype of the stored values.")


class CacheConfig(Frozen):
    """A teacher's signal on disk, made once and read by any number of runs."""

    path: str = Field(min_length=1, description="Folder of the cache; an unfinished one is gone on with.")
    codec: CodecConfig = Field(default_factory=TopKCodecConfig, description="What is stored of each token.")
    taps: CachedTapsConfig | None = Field(
        default_factory=CachedTapsConfig,
        description="Hidden states and attention inputs of the layers that the objective compares; null: none.",
    )
    shard_samples: int = Field(
        512, ge=1, description="Samples of one file. A rank holds one file in memory while it is made."
    )
