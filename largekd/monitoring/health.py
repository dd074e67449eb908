"""Figures that tell whether distillation works, from sums over tokens.

All are token-weighted means at temperature 1 in nats, over the vocabulary that both models share.
"""

import math
import sys
from collections.abc import Mapping

from largekd.contracts import HEALTH_NAMES, TEACHER_HEALTH_NAMES

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def health_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics `health/*`: each sum of HEALTH_NAMES over the weight, and the entropy gap = H(teacher) − H(student).

    A positive gap says that the student is more certain than its teacher. NaN where no token was counted.
    """
    mean = health_means(sums)
    return {
        "health/kl_t1": mean["kl_t1"],
        "health/top1_agreement": mean["top1_agree"],
        "health/student_entropy": mean["student_entropy"],
        "health/teacher_entropy": mean["teacher_entropy"],
        "health/entropy_gap": mean["teacher_entropy"] - mean["student_entropy"],
        "health/student_top1_accuracy": mean["student_top1_correct"],
    }


def perplexity(cross_entropy: float) -> float:
    """exp(cross_entropy), cross-entropy in nats per token; infinite where it exceeds a float."""
    return math.inf if cross_entropy > _LARGEST_EXPONENT else math.exp(cross_entropy)


def health_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Each sum of HEALTH_NAMES over the weight of the tokens it was taken on; NaN where there are none."""
    missing = [name for name in HEALTH_NAMES if name not in sums]
    assert not missing, f"health sums {missing} are missing; there are {sorted(sums)}"
    means = {}
    for name in HEALTH_NAMES:
        weight = sums["signal_weight" if name in TEACHER_HEALTH_NAMES else "token_weight"]
        means[name] = sums[name] / weight if weight else math.nan
    return means
