"""Rows that a model writes during the run, in place of rows of the training data."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class PolicyGradientConfig(Frozen):
    """-min(ratio * A, clip(ratio) * A) per sampled token, for the reward log p - log q of every token.

    A is the sum of the token's own and later rewards, less a baseline; ratio is the student's probability of the token
    now over that at sampling.
    """

    weight: float = Field(1.0, gt=0, description="Factor of the term; objective.alpha and temperature do not touch it.")
    clip: float | None = Field(0.2, gt=0, description="Farthest that a ratio counts from 1; null: no limit.")
    baseline: Literal["none", "batch_mean", "leave_one_out"] = Field(
        "leave_one_out",
        description="batch_mean: over all tokens sampled together. leave_one_out: the same position of the prompt's "
        "other samples.",
    )
    length_normalise: bool = Field(False, description="Mean of the rewards to come instead of their sum.")
    discount: float = Field(1.0, ge=0, le=1, description="Factor per token of distance on rewards to come.")


class RolloutConfig(Frozen):
    """A share of each step's rows holds answers that the student (or the teacher) gives to training prompts."""

    share: float = Field(0.5, ge=0, le=1, description="Probability that a row of a step is a generated one.")
    source: Literal["student", "teacher"] = Field(
        "student", description="Who writes: student is on-policy distillation, teacher is sequence-level distillation."
    )
    prompt_tokens: int = Field(
        ge=1, description="First tokens of a plain text; conversations with a longer prompt are passed over."
    )
    max_new_tokens: int = Field(ge=1, description="Longest answer.")
    temperature: float = Field(1.0, ge=0, description="Divides the writer's logits; 0: always the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the likeliest tokens that have this mass together.")
    top_k: int | None = Field(None, ge=1, description="Draw among this many likeliest tokens; null: among all.")
    samples_per_prompt: int = Field(1, ge=1, description="Answers to each prompt.")
    batch_size: int = Field(16, ge=1, description="Answers that a rank writes at the same time.")
    reuse: int = Field(1, ge=1, description="Steps in which a rollout may be used.")
    max_staleness: int = Field(8, ge=0, description="Steps after which a rollout is used no more.")
    gather: Literal["whole", "streamed", "auto"] = Field(
        "auto",
        description="whole: a whole copy of the writer on every rank while it writes. streamed: shards, gathered "
        "module by module for every token. auto: whole where it fits.",
    )
    log_samples: int = Field(0, ge=0, description="Rollouts of a logged step that TensorBoard shows as text.")
    policy_gradient: PolicyGradientConfig | None = Field(
        None, description="Also learn from the sampled tokens' rewards; null: from the divergences alone."
    )
