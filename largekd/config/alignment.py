"""The terms beside the vocabulary: hidden states and attention of chosen layers."""

from typing import Annotated, Literal

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.schedule import Scheduled


class ExplicitLayersConfig(Frozen):
    """Named pairs of layers."""

    map: Literal["explicit"]
    pairs: tuple[tuple[int, int], ...] = Field(
        min_length=1, description="[student layer, teacher layer]; the first is 0, negative ones count from the end."
    )


class UniformLayersConfig(Frozen):
    """`count` student layers at equal distances, the last among them, each with the teacher's at the same depth."""

    map: Literal["uniform"] = "uniform"
    count: int | None = Field(None, ge=1, description="Pairs; null: all student layers.")


class LastLayersConfig(Frozen):
    """The last `count` layers of both."""

    map: Literal["last"]
    count: int = Field(1, ge=1, description="Pairs.")


class SkipLayersConfig(Frozen):
    """Every `stride`-th student layer counted from the last, with the teacher's as many strides from its own last."""

    map: Literal["skip"]
    stride: int = Field(2, ge=1, description="Student layers from one pair to the next.")
    teacher_stride: int | None = Field(None, ge=1, description="Teacher layers; null: in proportion to the depths.")


class ClosestLayersConfig(Frozen):
    """Every teacher layer with the closest layer that the student kept of it (student.teacher_layers)."""

    map: Literal["closest_non_pruned"]


class AdaptiveLayersConfig(Frozen):
    """Chosen before the first step: student layers with the most similar teacher layers, in order."""

    map: Literal["adaptive"]
    count: int | None = Field(None, ge=1, description="Student layers; null: all.")
    rows: int = Field(8, ge=1, description="Rows of training data on which linear CKA is measured.")


LayersConfig = Annotated[
    ExplicitLayersConfig
    | UniformLayersConfig
    | LastLayersConfig
    | SkipLayersConfig
    | ClosestLayersConfig
    | AdaptiveLayersConfig,
    Field(discriminator="map"),
]


class NoProjectorConfig(Frozen):
    """Compare as they are: both widths must be equal."""

    kind: Literal["none"]


class PoolProjectorConfig(Frozen):
    """Average the wider side down to the width of the other; no parameters."""

    kind: Literal["pool"]


class LinearProjectorConfig(Frozen):
    """A linear map from the student's width to the teacher's."""

    kind: Literal["linear"] = "linear"
    bias: bool = Field(False, description="Add a bias.")
    shared: bool = Field(False, description="One for all pairs instead of one each.")


class MLPProjectorConfig(Frozen):
    """Linear, GELU, linear."""

    kind: Literal["mlp"]
    hidden: int | None = Field(None, ge=1, description="Width in the middle; null: the teacher's.")
    shared: bool = Field(False, description="One for all pairs instead of one each.")


class LowRankProjectorConfig(Frozen):
    """The (rectangular) identity plus a low-rank map that starts at zero."""

    kind: Literal["low_rank_identity"]
    rank: int = Field(8, ge=1, description="Rank of the map.")
    shared: bool = Field(True, description="One for all pairs instead of one each.")


ProjectorConfig = Annotated[
    NoProjectorConfig | PoolProjectorConfig | LinearProjectorConfig | MLPProjectorConfig | LowRankProjectorConfig,
    Field(discriminator="kind"),
]


class _Aligned(Frozen):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the term in logs, `align/<name>`.")
    weight: Scheduled = Field(1.0, description="Factor in the total loss; may be a curve.")
    layers: LayersConfig = Field(default_factory=UniformLayersConfig, description="Which layers are paired.")
    sample_pairs: int | None = Field(
        None, ge=1, description="Pairs drawn per step, one from each of as many blocks of layers; null: all."
    )


class FeatureConfig(_Aligned):
    """Hidden states of paired layers."""

    name: str = Field("hidden", pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the term in logs, `align/<name>`.")
    loss: Literal["mse", "normalised_mse", "cosine", "cka", "predictive"] = Field(
        "mse",
        description="mse; mse of unit-variance vectors; 1 - cosine; 1 - linear CKA per sample; predictive: cosine of a "
        "predictor's output.",
    )
    projector: ProjectorConfig = Field(
        default_factory=LinearProjectorConfig, description="From the student's width to the teacher's."
    )
    predictor_hidden: int | None = Field(None, ge=1, description="Width of the predictor; null: the teacher's width.")


class AttentionConfig(_Aligned):
    """Attention of paired layers, from queries and keys that are captured on the way."""

    name: str = Field(
        "attention", pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the term in logs, `align/<name>`."
    )
    loss: Literal["cosine", "kl", "mse", "relation"] = Field(
        "kl",
        description="Per query row: 1 - cosine, KL(teacher || student), squared distance of unit rows; relation: KL of "
        "the relations below.",
    )
    relations: tuple[Literal["qq", "kk", "vv", "qk"], ...] = Field(
        ("qq", "kk", "vv"), min_length=1, description="Relations of the loss `relation`."
    )
    relation_heads: int = Field(8, ge=1, description="Heads into which both widths are cut for the loss `relation`.")
    match_heads: Literal["group", "repeat", "pool"] = Field(
        "group",
        description="Unequal head counts: average groups of the larger, repeat the smaller, or pool to any count.",
    )
    head_importance: Literal["uniform", "learned", "entropy", "variance"] = Field(
        "uniform", description="Weights of heads, which sum to one: equal, trained, or from the teacher's maps."
    )
    query_block: int = Field(128, ge=1, description="Queries whose maps exist at one time.")
