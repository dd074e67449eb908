"""The terms of an objective: what the fused pass evaluates, and what the step weighs and divides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from largekd.config.alignment import AttentionConfig, FeatureConfig
from largekd.config.divergence import (
    AdaptiveKLConfig,
    AlphaBetaConfig,
    BidirectionalKLConfig,
    DivergenceConfig,
    ForwardKLConfig,
    JSDConfig,
    LogitMSEConfig,
    PluginConfig,
    RankingHingeConfig,
    ReverseKLConfig,
    SampledSignalConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
    SortedDistanceConfig,
    SpanLikelihoodConfig,
    TopKSignalConfig,
    TotalVariationConfig,
)
from largekd.config.objective import ObjectiveConfig
from largekd.config.objective_checks import DEEP_PREFIX
from largekd.config.rollouts import RolloutConfig
from largekd.config.router_checks import ROUTER_TERMS
from largekd.config.schedule import CurveConfig, extremes
from largekd.contracts import SampledRequest, SignalRequest, TapRequest, TopKRequest
from largekd.errors import ConfigError
from largekd.objectives import divergences
from largekd.objectives.plugins import PluginFunction, PluginTerm
from largekd.objectives.schedules import value_at


@dataclass(frozen=True)
class SpanLikelihood:
    """Marks the term of `spans.py`, which looks at several tokens at once."""


@dataclass(frozen=True)
class PolicyGradient:
    """Marks the term of `policy.py`, whose rewards come with the batch; `clip` None: ratios are not limited."""

    clip: float | None


@dataclass(frozen=True)
class VocabularyTerm:
    """A term of the fused pass; `divergence` None is the cross-entropy of the labels at temperature 1."""

    name: str
    divergence: divergences.Divergence | PluginTerm | SpanLikelihood | PolicyGradient | None

    @property
    def reads_teacher(self) -> bool:
        """Whether it depends on the teacher."""
        return self.divergence is not None and not isinstance(self.divergence, PolicyGradient)


@dataclass(frozen=True)
class Summand:
    """One summand of the loss: its factor over the run, and what its sum is divided by (a name of COUNT_NAMES).

    `share` says what multiplies `weight`: 1 − α for the task, α·T² for distillation, α for likelihoods (which know no
    temperature), 1 for alignment, routers and the policy gradient, α for alignment with a self-shared teacher, 1 for
    that teacher's own loss. `scale` multiplies it once more. `selective`: a selection of tokens applies.
    """

    name: str
    share: Literal[
        "task", "distillation", "likelihood", "alignment", "distilled_alignment", "teacher", "policy", "router"
    ]
    weight: float | CurveConfig
    count: str
    selective: bool = False
    scale: float | CurveConfig = 1.0

    @property
    def metric(self) -> str:
        """Area and name under which the term is logged."""
        area = "align" if self.share.endswith("alignment") else "router" if self.share == "router" else "kd"
        return f"{area}/{self.name}"


@dataclass(frozen=True)
class Objective:
    """All terms with a weight: those of the vocabulary pass first, then features, attention and routers, then those of
    the vocabulary pass for each of `deep_layers`."""

    config: ObjectiveConfig
    vocabulary: tuple[VocabularyTerm, ...]
    features: tuple[FeatureConfig, ...]
    attention: tuple[AttentionConfig, ...]
    summands: tuple[Summand, ...]
    deep_layers: tuple[int, ...] = ()

    def alpha(self, *, step: int, max_steps: int) -> float:
        """The share of the divergences at a step (0 is the first)."""
        return value_at(self.config.alpha, step=step, max_steps=max_steps)

    def temperature(self, *, step: int, max_steps: int) -> float:
        """The temperature of the divergences at a step."""
        return value_at(self.config.temperature, step=step, max_steps=max_steps)

    def factors(self, *, step: int, max_steps: int) -> tuple[float, ...]:
        """What each summand's mean is multiplied by at a step."""
        alpha = self.alpha(step=step, max_steps=max_steps)
        squared = self.temperature(step=step, max_steps=max_steps) ** 2
        shares = {
            "task": 1.0 - alpha,
            "distillation": alpha * squared,
            "likelihood": alpha,
            "alignment": 1.0,
            "policy": 1.0,
            "router": 1.0,
            "distilled_alignment": alpha,
            "teacher": 1.0,
        }
        return tuple(
            shares[summand.share]
            * value_at(summand.weight, step=step, max_steps=max_steps)
            * value_at(summand.scale, step=step, max_steps=max_steps)
            for summand in self.summands
        )

    @property
    def router_terms(self) -> tuple[str, ...]:
        """Names of the summands over routers, in order."""
        return tuple(summand.name for summand in self.summands if summand.share == "router")

    def request(self, *, step: int, max_steps: int, taps: TapRequest, seed: int = 0) -> SignalRequest:
        """What the teacher must deliver at a step; `seed` is the run's."""
        if not any(term.reads_teacher for term in self.vocabulary):
            return SignalRequest(taps=taps)
        temperature = self.temperature(step=step, max_steps=max_steps)
        match self.config.signal:
            case TopKSignalConfig(k=k):
                return SignalRequest(TopKRequest(k=k, temperature=temperature), taps)
            case SampledSignalConfig(draws=draws, proposal_power=power):
                return SignalRequest(SampledRequest(draws, power, temperature, seed=seed * 1_000_003 + step), taps)
        return SignalRequest(self._whole(temperature=temperature), taps)

    @property
    def evaluation_request(self) -> SignalRequest:
        """What the teacher must deliver for figures on held-out data: as much as there is, at temperature 1."""
        return SignalRequest(self._whole(temperature=1.0))

    def _whole(self, *, temperature: float) -> Literal["full"] | TopKRequest:
        translation = self.config.translation
        if translation is not None and translation.method == "spans":
            return TopKRequest(k=translation.top_k, temperature=temperature)
        return "full"


def build_objective(
    config: ObjectiveConfig,
    *,
    plugins: Mapping[str, PluginFunction] | None = None,
    rollouts: RolloutConfig | None = None,
) -> Objective:
    """The terms that have a weight at some step.

    Errors: ConfigError when none is left, and for a plugin's term that no module has.
    """
    vocabulary: list[VocabularyTerm] = []
    summands: list[Summand] = []
    low, high = extremes(config.alpha)
    if low < 1.0:
        vocabulary.append(VocabularyTerm("cross_entropy", None))
        summands.append(Summand("cross_entropy", "task", 1.0, "task_tokens"))
    for entry in config.divergences if high > 0.0 else ():
        if extremes(entry.weight)[1] <= 0.0:
            continue
        name = entry.term if isinstance(entry, PluginConfig) else entry.name
        vocabulary.append(VocabularyTerm(name, divergence_of(entry, plugins=plugins or {})))
        if isinstance(entry, SpanLikelihoodConfig):
            summands.append(Summand(name, "likelihood", entry.weight, "spans"))
        else:
            summands.append(Summand(name, "distillation", entry.weight, "signal_tokens", selective=True))
    if rollouts is not None and rollouts.share > 0 and rollouts.policy_gradient is not None:
        chosen = rollouts.policy_gradient
        vocabulary.append(VocabularyTerm("policy_gradient", PolicyGradient(clip=chosen.clip)))
        summands.append(Summand("policy_gradient", "policy", chosen.weight, "sampled_tokens"))
    deep, deep_layers = _deep_summands(config, summands=summands)
    features = tuple(entry for entry in config.features if extremes(entry.weight)[1] > 0.0)
    attention = tuple(entry for entry in config.attention if extremes(entry.weight)[1] > 0.0)
    for feature in features:
        summands.append(
            Summand(feature.name, "alignment", feature.weight, "samples" if feature.loss == "cka" else "positions")
        )
    summands += [Summand(entry.name, "alignment", entry.weight, "positions") for entry in attention]
    summands += _router_summands(config)
    summands += deep
    if not summands:
        raise ConfigError(
            f"objective: alpha is {config.alpha} and no term has a positive weight, so that nothing is trained; "
            "lower objective.alpha or add an entry to objective.divergences"
        )
    return Objective(config, tuple(vocabulary), features, attention, tuple(summands), deep_layers)


def _router_summands(config: ObjectiveConfig) -> list[Summand]:
    """The terms over routers that have a weight at some step."""
    router = config.router
    if router is None:
        return []
    weights = (router.balance, router.z, 0.0 if router.distil is None else router.distil.weight)
    counts = ("routed_tokens", "routed_tokens", "positions")
    return [
        Summand(name, "router", weight, count)
        for name, weight, count in zip(ROUTER_TERMS, weights, counts, strict=True)
        if extremes(weight)[1] > 0.0
    ]


def _deep_summands(config: ObjectiveConfig, *, summands: Sequence[Summand]) -> tuple[list[Summand], tuple[int, ...]]:
    """The same vocabulary terms for each intermediate layer, and the layers in ascending order; none without weight.

    A selection is made by the last layer's own figures, so that the others learn from all tokens.
    """
    deep = config.deep_supervision
    if deep is None or extremes(deep.weight)[1] <= 0.0 or not summands:
        return [], ()
    layers = tuple(sorted(deep.layers))
    return [
        replace(summand, name=f"{DEEP_PREFIX}{layer}.{summand.name}", scale=deep.weight, selective=False)
        for layer in layers
        for summand in summands
    ], layers


def divergence_of(
    config: DivergenceConfig, *, plugins: Mapping[str, PluginFunction]
) -> divergences.Divergence | PluginTerm | SpanLikelihood:
    """The row function that a divergence's entry in the configuration stands for. Errors: ConfigError."""
    match config:
        case ForwardKLConfig():
            return divergences.forward_kl
        case ReverseKLConfig():
            return divergences.reverse_kl
        case BidirectionalKLConfig():
            return divergences.BidirectionalKL(config.forward_weight, config.reverse_weight)
        case JSDConfig():
            return divergences.JSD(mix=config.mix)
        case SkewedForwardKLConfig():
            return divergences.SkewedForwardKL(skew=config.skew)
        case SkewedReverseKLConfig():
            return divergences.SkewedReverseKL(skew=config.skew)
        case AdaptiveKLConfig():
            return divergences.AdaptiveKL(head_mass=config.head_mass)
        case TotalVariationConfig():
            return divergences.total_variation
        case AlphaBetaConfig():
            return divergences.AlphaBeta(alpha=config.alpha, beta=config.beta)
        case LogitMSEConfig():
            return divergences.logit_mse
        case RankingHingeConfig():
            return divergences.RankingHinge(top_k=config.top_k, margin=config.margin)
        case SortedDistanceConfig():
            return divergences.sorted_distance
        case SpanLikelihoodConfig():
            return SpanLikelihood()
        case PluginConfig():
            if config.term not in plugins:
                raise ConfigError(
                    f"objective.divergences: the term {config.term!r} is in none of the modules of `plugins`; they "
                    f"have {', '.join(sorted(plugins)) or 'none'}."
                )
            return PluginTerm(plugins[config.term], tuple(sorted(config.options.items())))
