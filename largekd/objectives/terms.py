"""The vocabulary terms of an objective: (1 − α)·CE + α·T²·Σ w·D, as records that the fused pass evaluates together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from largekd.config.objective import (
    DivergenceConfig,
    ForwardKLConfig,
    JSDConfig,
    ObjectiveConfig,
    ReverseKLConfig,
)
from largekd.contracts import SignalRequest
from largekd.errors import ConfigError
from largekd.objectives.divergences import JSD, Divergence, forward_kl, reverse_kl


@dataclass(frozen=True)
class VocabularyTerm:
    """One summand of the loss; `divergence` None is the cross-entropy of the labels at temperature 1.

    `weight` is the factor before the division by the count named `count_key`.
    """

    name: str
    weight: float
    divergence: Divergence | None
    needs: SignalRequest
    count_key: str = "label_tokens"


def build_terms(config: ObjectiveConfig) -> tuple[VocabularyTerm, ...]:
    """The terms with a positive weight: cross-entropy (1 − α), then the divergences (α·T²·w) in the order given.

    Raises ConfigError when a divergence is named twice or when no term is left.
    """
    twice = [name for name, times in Counter(entry.name for entry in config.divergences).items() if times > 1]
    if twice:
        raise ConfigError(f"objective.divergences names {twice[0]!r} more than once; keep one entry of each name")
    squared = config.alpha * config.temperature**2
    terms = [
        VocabularyTerm(name="cross_entropy", weight=1.0 - config.alpha, divergence=None, needs=SignalRequest()),
        *(
            VocabularyTerm(
                name=entry.name,
                weight=squared * entry.weight,
                divergence=divergence_of(entry),
                needs=SignalRequest(distribution=True),
            )
            for entry in config.divergences
        ),
    ]
    active = tuple(term for term in terms if term.weight > 0)
    if not active:
        raise ConfigError(
            f"objective: alpha is {config.alpha} and no divergence has a positive weight, so that nothing is trained; "
            "lower objective.alpha or add an entry to objective.divergences"
        )
    return active


def divergence_of(config: DivergenceConfig) -> Divergence:
    """The row function that a divergence's entry in the configuration stands for."""
    match config:
        case ForwardKLConfig():
            return forward_kl
        case ReverseKLConfig():
            return reverse_kl
        case JSDConfig():
            return JSD(mix=config.mix)


def request_of(terms: Sequence[VocabularyTerm]) -> SignalRequest:
    """What a teacher must deliver for these terms: the union of their needs."""
    return SignalRequest(distribution=any(term.needs.distribution for term in terms))
