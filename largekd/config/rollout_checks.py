"""Rules that join the rollouts' keys with others."""

from collections.abc import Iterator

from largekd.config.rollouts import PolicyGradientConfig, RolloutConfig
from largekd.config.run import RunConfig
from largekd.config.schedule import extremes


def check_rollouts(config: RunConfig) -> Iterator[str]:
    """The rules that the rollouts break, one line each."""
    rollouts = config.rollouts
    if rollouts is None or rollouts.share == 0:
        return
    yield from _lengths(rollouts, sequence_length=config.train.sequence_length)
    yield from _teacher(config, rollouts=rollouts)
    if config.objective.translation is not None:
        yield "rollouts: not with objective.translation; sampled tokens have no text that the teacher's tokens spell"
    if rollouts.source == "student" and rollouts.policy_gradient is None and extremes(config.objective.alpha)[1] == 0:
        yield (
            "rollouts.source = 'student': objective.alpha = 0 takes no divergence on the student's own tokens; raise "
            "it or set rollouts.policy_gradient"
        )
    if rollouts.policy_gradient is not None:
        yield from _policy_gradient(rollouts, chosen=rollouts.policy_gradient, config=config)


def _lengths(rollouts: RolloutConfig, *, sequence_length: int) -> Iterator[str]:
    # The last token of a sample has no position.
    needed = rollouts.prompt_tokens + rollouts.max_new_tokens - 1
    if needed > sequence_length:
        yield (
            f"rollouts.max_new_tokens = {rollouts.max_new_tokens}: with rollouts.prompt_tokens = "
            f"{rollouts.prompt_tokens} an answer fills {needed} positions and train.sequence_length = {sequence_length}"
        )
    if rollouts.temperature == 0 and rollouts.samples_per_prompt > 1:
        yield (
            f"rollouts.samples_per_prompt = {rollouts.samples_per_prompt}: at rollouts.temperature = 0 all samples of "
            "a prompt are the same; it must be 1"
        )


def _teacher(config: RunConfig, *, rollouts: RolloutConfig) -> Iterator[str]:
    teacher = config.teacher
    if teacher.kind == "mixture" and teacher.weighting.kind == "routed":
        yield (
            "rollouts: teacher.weighting.kind = 'routed' looks a teacher up in a record, and sampled tokens have "
            "none; choose another kind"
        )
    if teacher.kind == "mixture" and teacher.weighting.kind == "learned" and rollouts.source == "student":
        yield (
            "rollouts.source = 'student': teacher.weighting.kind = 'learned' fits the weights to labels, and sampled "
            "tokens are the student's own; choose another kind"
        )
    if teacher.kind == "self_shared":
        yield "rollouts: not with teacher.kind = 'self_shared', whose two models share one forward; take the block out"
    if teacher.kind == "cached" or (
        teacher.kind == "mixture" and any(member.teacher.kind == "cached" for member in teacher.members)
    ):
        yield (
            "rollouts: a cached teacher has no signal for tokens that were sampled after it was stored; choose another "
            "teacher.kind, or rollouts.share=0"
        )
    if rollouts.source == "teacher" and teacher.kind != "online":
        yield f"rollouts.source = 'teacher': needs teacher.kind = 'online'; {teacher.kind!r} cannot write"


def _policy_gradient(rollouts: RolloutConfig, *, chosen: PolicyGradientConfig, config: RunConfig) -> Iterator[str]:
    key = "rollouts.policy_gradient"
    if rollouts.source == "teacher":
        yield f"{key}: is the gradient of the student's own samples; rollouts.source must be 'student'"
    if config.teacher.kind not in ("online", "ema"):
        yield f"{key}: reads the teacher's probability of any token, which teacher.kind {config.teacher.kind!r} lacks"
    if rollouts.temperature == 0:
        yield f"{key}: rollouts.temperature = 0 draws nothing, and the likeliest tokens are no sample; 1 is unbiased"
    if chosen.baseline == "leave_one_out" and rollouts.samples_per_prompt == 1:
        yield (
            f"{key}.baseline = 'leave_one_out': needs other samples of the prompt; raise rollouts.samples_per_prompt "
            "to 2 or more, or choose batch_mean"
        )
    if config.objective.deep_supervision is not None:
        yield f"{key}: an inner layer has drawn no samples; take objective.deep_supervision out"
    if any(term_name == "policy_gradient" for term_name in _names(config)):
        yield f"{key}: a term of objective is called policy_gradient; choose another name for it"


def _names(config: RunConfig) -> Iterator[str]:
    objective = config.objective
    yield from (term.term for term in objective.divergences if term.name == "plugin")
    yield from (entry.name for entry in (*objective.features, *objective.attention))
