"""Where the teacher's signal comes from: one record per kind of teacher, told apart by `teacher.kind`."""

from typing import Annotated, Literal

from pydantic import Field

from largekd.config.adapters import SelfSharedTeacherConfig
from largekd.config.common import Frozen
from largekd.config.model import SourceModelConfig


class OnlineTeacherConfig(SourceModelConfig):
    """A frozen model that runs beside the student."""

    kind: Literal["online"] = Field("online", description="Where the signal comes from.")
    model: str = Field(description="Hugging Face folder or hub name.")
    gather_head: Literal["step", "micro_batch"] = Field(
        "step", description="Gather the vocabulary head once per optimizer step, or around every forward."
    )


class CachedTeacherConfig(Frozen):
    """What launch/cache_teacher.py stored of a teacher, which then need not be there any more."""

    kind: Literal["cached"] = Field(description="Where the signal comes from.")
    path: str = Field(description="Folder that launch/cache_teacher.py wrote.")
    model: str | None = Field(
        None, description="The cached teacher itself, where the student is made of its layers; it must be the same."
    )
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships.")


class RemoteTeacherConfig(Frozen):
    """A teacher behind HTTP: launch/serve_teacher.py, or a server that returns log-probabilities of prompts."""

    kind: Literal["remote"] = Field(description="Where the signal comes from.")
    model: str = Field(
        description="Folder or hub name with its config.json and tokenizer; weights only for student.teacher_layers."
    )
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships.")
    servers: tuple[str, ...] = Field(min_length=1, description="Base addresses of its replicas.")
    protocol: Literal["largekd", "vllm", "sglang"] = Field(
        "largekd", description="largekd: launch/serve_teacher.py. vllm, sglang: likeliest ids of prompts."
    )
    served_model: str | None = Field(None, description="Model name that an OpenAI-compatible server expects.")
    token_variable: str | None = Field(None, description="Environment variable with the bearer token; null: none.")
    allow_remote: bool = Field(False, description="Send texts to addresses that are not of this machine.")
    timeout_s: float = Field(60.0, gt=0, description="Longest wait for one answer.")
    retries: int = Field(5, ge=0, description="Attempts after a failed one before the run waits for the server.")
    wait_s: float = Field(
        3600.0, ge=0, description="How long the run waits for a server that is gone before it stops and saves."
    )


class EMATeacherConfig(Frozen):
    """The exponential moving average of the student's own weights."""

    kind: Literal["ema"] = Field(description="Where the signal comes from.")
    deepspeed: str = Field(description="ds_configs file with the average's placement.")
    decay: float = Field(0.999, ge=0, lt=1, description="Share of the average that a step keeps.")
    warmup: bool = Field(True, description="Early on keep less: at step n no more than (1 + n) / (10 + n).")
    gather_head: Literal["step", "micro_batch"] = Field(
        "step", description="Gather the vocabulary head once per optimizer step, or around every forward."
    )


class BackboneTeacherConfig(Frozen):
    """The student's own frozen base, without its adapters (student.lora); it takes no memory for weights."""

    kind: Literal["base"] = Field(description="Where the signal comes from.")


class MixtureMemberConfig(Frozen):
    """One of several teachers."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="What it is called in logs and in data.")
    weight: float = Field(1.0, ge=0, description="Its share; all shares are divided by their sum.")
    teacher: Annotated[OnlineTeacherConfig | CachedTeacherConfig, Field(discriminator="kind")] = Field(
        description="The teacher itself: a model that runs beside the student, or a cache of hidden states."
    )


class FixedWeightsConfig(Frozen):
    """The members' weights as they are."""

    kind: Literal["fixed"] = "fixed"


class LearnedWeightsConfig(Frozen):
    """Weights that raise the mixture's likelihood of the labels (expectation maximisation, step by step)."""

    kind: Literal["learned"]
    rate: float = Field(0.05, gt=0, le=1, description="Share of a step's posterior that enters the weights.")


class RoutedWeightsConfig(Frozen):
    """Each record names its teacher in a column; a record without a name takes the members' weights."""

    kind: Literal["routed"]
    field: str = Field("teacher", min_length=1, description="Column with a member's name.")


class ConfidenceWeightsConfig(Frozen):
    """Per token, weights times exp(-entropy / scale), divided by their sum: the surer teacher counts more."""

    kind: Literal["confidence"]
    scale: float = Field(1.0, gt=0, description="Nats of entropy that divide a teacher's weight by e.")


WeightingConfig = Annotated[
    FixedWeightsConfig | LearnedWeightsConfig | RoutedWeightsConfig | ConfidenceWeightsConfig,
    Field(discriminator="kind"),
]


class MixtureTeacherConfig(Frozen):
    """Several teachers with one tokenizer; the student learns from the mixture of their probabilities."""

    kind: Literal["mixture"] = Field(description="Where the signal comes from.")
    members: tuple[MixtureMemberConfig, ...] = Field(min_length=2, description="The teachers.")
    weighting: WeightingConfig = Field(default_factory=FixedWeightsConfig, description="How their shares come about.")


TeacherConfig = Annotated[
    OnlineTeacherConfig
    | CachedTeacherConfig
    | RemoteTeacherConfig
    | EMATeacherConfig
    | MixtureTeacherConfig
    | SelfSharedTeacherConfig
    | BackboneTeacherConfig,
    Field(discriminator="kind"),
]
