"""Names of metrics: how they are spelt, and what the common ones mean."""

import re
from collections.abc import Mapping

from largekd.errors import ConfigError

# Names without an area: the two that every record has.
REQUIRED = ("loss", "tokens")

# Metric -> meaning and unit. `<…>` stands for a name of the run (a term, a parameter group).
METRICS: Mapping[str, str] = {
    "loss": "weighted sum of all terms, per counted token, mean over the window",
    "tokens": "label tokens counted since the run began, over all ranks",
    "kd/<term>": "a term before its weight, nats per counted token for vocabulary terms",
    "kd_weighted/<term>": "the same times its weight: what it adds to the loss",
    "align/<term>": "an alignment term before its weight, mean over what it counts (positions, samples)",
    "align_weighted/<term>": "the same times its weight",
    "kd/kept_frac": "share of the tokens with a signal that a selection kept",
    "teacher/weight/<teacher>": "a teacher's share of the mixture: at this step, over its counted tokens; learned: now",
    "kd/kl_t1/<teacher>": "KL(one of several teachers‖student) at temperature 1 at this step, nats per token",
    "kd/teacher_ce/<teacher>": "cross-entropy of one of several teachers on the labels at this step, nats per token",
    "kd/teacher_cross_entropy": "a self-shared teacher's own loss, nats per label token",
    "router/load_balance": "load-balance loss before its weight, mean over layers; 1 where loads are equal",
    "router/router_z": "z loss before its weight, mean over tokens and layers",
    "router/router_kl": "KL(teacher's experts‖student's experts), nats per token, mean over pairs of layers",
    "router_weighted/<term>": "the same times its weight",
    "router/max_load": "largest load of an expert over the mean, over the window; mean of layers, and per layer",
    "router/dead_frac": "share of experts without a token in the window; mean of layers, and per layer",
    "router/entropy": "entropy of the routing distribution, nats per token; mean of layers, and per layer",
    "router/overlap": "share of the teacher's chosen experts that the student chose; mean of pairs, and per pair",
    "prune/neurons_frac": "share of a self-shared student's neurons that are pruned; so head_groups, layers",
    "prune/mean_rank": "ranks in use, mean over a self-shared student's adapters",
    "prune/duplicated_frac": "parameters that a self-shared teacher has for itself, over the backbone's",
    "grad_norm/<term>": "norm of a term's gradient of the activations it reads (`log.term_gradients`)",
    "health/kl_t1": "KL(teacher‖student) at temperature 1, nats per token",
    "health/top1_agreement": "share of tokens on which both models rank the same token first",
    "health/student_entropy": "entropy of the student's distribution, nats per token",
    "health/teacher_entropy": "entropy of the teacher's distribution, nats per token",
    "health/entropy_gap": "teacher's entropy less the student's; positive: the student is more certain",
    "health/student_top1_accuracy": "share of tokens on which the student ranks the label first",
    "stage/index": "stage of a run that has several, 0 is the first",
    "stage/phase": "the same with every phase of progressive freezing counted",
    "optim/grad_norm": "norm of the whole gradient before clipping",
    "optim/lr/<group>": "learning rate of a parameter group",
    "optim/skipped_steps": "steps skipped since the run began because of a non-finite gradient",
    "rollout/rows": "rows of the step that were generated, over all ranks",
    "rollout/length": "mean tokens of the answers that the step used",
    "rollout/ended_frac": "share of them that ended before their greatest length",
    "rollout/staleness": "mean steps since they were written",
    "rollout/reward": "mean of log p − log q over their tokens, nats (`rollouts.policy_gradient`)",
    "rollout/generate_s": "seconds that the step spent on writing and scoring; 0 where none was written",
    "rollout/tokens_per_s": "tokens written per second of it, over all ranks",
    "perf/tokens_per_s": "label tokens per second of wall time, over all ranks",
    "perf/step_s": "seconds per optimizer step",
    "perf/teacher_s": "seconds per step for the teacher's signals",
    "perf/student_s": "seconds per step for the student's forward and backward",
    "perf/optimizer_s": "seconds per step for the optimizer's update",
    "perf/data_s": "seconds per step spent waiting for data",
    "teacher/decay": "share of the student's average that the next step keeps (`teacher.kind: ema`)",
    "memory/rss_bytes": "resident memory of a rank's process",
    "memory/peak_rss_bytes": "its largest value since the process started",
    "memory/anonymous_bytes": "resident memory without mapped files",
    "memory/accelerator_peak_bytes": "largest memory allocated on the accelerator",
    "schedule/temperature": "temperature of the divergence at this step",
    "schedule/alpha": "α of (1−α)·CE + α·T²·KL at this step",
    "schedule/layer_drop": "probability with which this step leaves a layer out (`student.layer_drop`)",
    "schedule/factor/<term>": "what the term's mean is multiplied by at this step",
    "eval/perplexity": "exp of the student's cross-entropy on held-out text",
    "eval/teacher_perplexity": "the same of the teacher",
    "eval/depth_<layers>/perplexity": "of the student with so many of its layers alone (`eval.depths`); kl too",
    "eval/ce": "the student's cross-entropy on held-out text, nats per token",
    "eval/kl": "KL(teacher‖student) on held-out text at temperature 1, nats per token",
    "eval/top1_agreement": "as health/, on held-out text",
    "eval/accuracy": "share of held-out tokens on which the student ranks the label first",
    "eval/student_entropy": "as health/, on held-out text",
    "eval/teacher_entropy": "as health/, on held-out text",
    "eval/entropy_gap": "as health/, on held-out text",
    "eval/tokens": "held-out tokens that were counted",
}

_NAME = re.compile(r"[a-z][a-z0-9_]*(/[^/\s][^/]*)+")
_NOT_IN_TAGS = re.compile(r"[^A-Za-z0-9_./-]")


def check_name(name: str) -> None:
    """Asserts that a metric is called `area/name` (or `loss`, `tokens`): lower-case area, no empty part."""
    assert name in REQUIRED or _NAME.fullmatch(name), (
        f"metric {name!r} must be called area/name, as optim/grad_norm (or be one of {REQUIRED})"
    )


class Tags:
    """TensorBoard tags of metrics: characters other than A-Z a-z 0-9 _ . / - become underscores."""

    def __init__(self) -> None:
        self._name_of: dict[str, str] = {}

    def tag(self, name: str) -> str:
        """The tag of `name`. Raises ConfigError when two metrics would share one."""
        tag = _NOT_IN_TAGS.sub("_", name)
        owner = self._name_of.setdefault(tag, name)
        if owner != name:
            raise ConfigError(
                f"metrics {owner!r} and {name!r} would share the TensorBoard tag {tag!r}: rename one of the terms or "
                "parameter groups in the run's configuration, using letters, digits, '_', '.' and '-'"
            )
        return tag
