"""The terms over the vocabulary: divergences between the teacher's and the student's next-token distribution."""

from typing import Annotated, Any, Literal

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.schedule import Scheduled


class _Weighted(Frozen):
    weight: Scheduled = Field(1.0, description="Factor inside the sum of divergences; may be a curve.")


class ForwardKLConfig(_Weighted):
    """KL(teacher || student)."""

    name: Literal["forward_kl"]


class ReverseKLConfig(_Weighted):
    """KL(student || teacher)."""

    name: Literal["reverse_kl"]


class BidirectionalKLConfig(_Weighted):
    """forward_weight * KL(teacher || student) + reverse_weight * KL(student || teacher)."""

    name: Literal["bidirectional_kl"]
    forward_weight: float = Field(0.5, ge=0, description="Factor of the forward direction.")
    reverse_weight: float = Field(0.5, ge=0, description="Factor of the reverse direction.")


class JSDConfig(_Weighted):
    """mix * KL(teacher || m) + (1 - mix) * KL(student || m) with m = mix * teacher + (1 - mix) * student."""

    name: Literal["jsd"]
    mix: float = Field(0.5, gt=0, lt=1, description="The teacher's share in the mixture.")


class SkewedForwardKLConfig(_Weighted):
    """KL(teacher || skew * teacher + (1 - skew) * student)."""

    name: Literal["skewed_forward_kl"]
    skew: float = Field(0.1, ge=0, lt=1, description="The teacher's share in the second argument.")


class SkewedReverseKLConfig(_Weighted):
    """KL(student || skew * student + (1 - skew) * teacher)."""

    name: Literal["skewed_reverse_kl"]
    skew: float = Field(0.1, ge=0, lt=1, description="The student's share in the second argument.")


class AdaptiveKLConfig(_Weighted):
    """Both directions of KL, weighted per token by where the two differ: in the teacher's head or its tail."""

    name: Literal["adaptive_kl"]
    head_mass: float = Field(0.5, gt=0, lt=1, description="Teacher's mass that its likeliest ids make up: the head.")


class TotalVariationConfig(_Weighted):
    """sum |teacher - student| / 2."""

    name: Literal["total_variation"]


class AlphaBetaConfig(_Weighted):
    """The alpha-beta divergence; (1, 0) would be forward KL and (0, 1) reverse KL, which have names of their own."""

    name: Literal["alpha_beta"]
    alpha: float = Field(0.5, gt=0, description="Power of the teacher's probabilities.")
    beta: float = Field(0.5, gt=0, description="Power of the student's probabilities.")


class LogitMSEConfig(_Weighted):
    """Half of the mean square of the difference of centred logits: what T^2 * KL becomes for a high temperature."""

    name: Literal["logit_mse"]


class RankingHingeConfig(_Weighted):
    """Mean over pairs of the teacher's likeliest ids of max(0, margin - (student's logit of the likelier - other))."""

    name: Literal["ranking_hinge"]
    top_k: int = Field(8, ge=2, le=64, description="Teacher's ids whose order is learnt.")
    margin: float = Field(1.0, gt=0, description="Least distance of two student logits, after the temperature.")


class SortedDistanceConfig(_Weighted):
    """sum over ranks of |teacher's n-th largest probability - student's|: universal logit distillation."""

    name: Literal["sorted_distance"]


class SpanLikelihoodConfig(_Weighted):
    """Binary KL of the probability that each model gives to a span of text that the student has in several tokens; at
    temperature 1, so that its factor is alpha * weight."""

    name: Literal["span_likelihood"]


class PluginConfig(_Weighted):
    """A term of a module that `plugins` names."""

    name: Literal["plugin"]
    term: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Its name in the module's TERMS, and in logs.")
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments for it.")


DivergenceConfig = Annotated[
    ForwardKLConfig
    | ReverseKLConfig
    | BidirectionalKLConfig
    | JSDConfig
    | SkewedForwardKLConfig
    | SkewedReverseKLConfig
    | AdaptiveKLConfig
    | TotalVariationConfig
    | AlphaBetaConfig
    | LogitMSEConfig
    | RankingHingeConfig
    | SortedDistanceConfig
    | SpanLikelihoodConfig
    | PluginConfig,
    Field(discriminator="name"),
]


class FullSignalConfig(Frozen):
    """The teacher's whole distribution."""

    kind: Literal["full"] = "full"


class TopKSignalConfig(Frozen):
    """The teacher's likeliest ids and the mass of all others."""

    kind: Literal["top_k"]
    k: int = Field(64, ge=1, description="Ids that are kept.")
    tail: Literal["tail", "renormalise", "drop"] = Field(
        "tail",
        description="All other ids as one outcome, the kept ones as if they were all, or a sum over the kept ones.",
    )


class SampledSignalConfig(Frozen):
    """Ids drawn from the teacher, with importance weights: an unbiased gradient of forward KL."""

    kind: Literal["sampled"]
    draws: int = Field(12, ge=1, description="Draws per position.")
    proposal_power: float = Field(1.0, gt=0, le=1, description="Draws come from probabilities to this power.")


SignalConfig = Annotated[FullSignalConfig | TopKSignalConfig | SampledSignalConfig, Field(discriminator="kind")]


class SelectionConfig(Frozen):
    """Which tokens the divergences are taken on; cross-entropy keeps all."""

    by: Literal["teacher_entropy", "student_entropy", "gap"] = Field(
        description="A token's score: an entropy, or KL(teacher || student), at temperature 1."
    )
    keep: Literal["above", "below"] = Field("above", description="Keep scores above or below the limit.")
    threshold: float | None = Field(
        None, ge=0, description="The limit in nats; the sum over kept tokens is divided by all tokens with a signal."
    )
    share: float | None = Field(
        None, gt=0, lt=1, description="Share of tokens to keep; the limit is the quantile of the step before."
    )


class TranslationConfig(Frozen):
    """How a teacher with another tokenizer is understood."""

    method: Literal["spans", "sorted"] = Field(
        "spans", description="spans: ids with the same bytes, and merged tokens. sorted: sorted_distance alone."
    )
    top_k: int = Field(256, ge=1, description="Teacher's likeliest ids that are looked up in the student's vocabulary.")
