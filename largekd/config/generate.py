"""What a model is asked to write, and how: the configuration of launch/generate.py."""

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from largekd.config.addresses import address_problems
from largekd.config.common import Frozen
from largekd.config.curation import CurationConfig
from largekd.config.output import LogConfig


class RowSourceConfig(Frozen):
    """Rows of a data set; each becomes a prompt."""

    kind: Literal["rows"] = "rows"
    path: str = Field(description="File, folder or glob of .jsonl/.json/.csv/.parquet, or a hub data set's name.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    question: str = Field("question", description="Column with the question or instruction, or with chat messages.")
    answer: str | None = Field(
        None, description="Column with the right answer, or with chat messages; null: there is none."
    )
    tests: str | None = Field(None, description="Column with unit tests (Python), for programs.")
    id: str | None = Field(None, description="Column that names a row; null: a hash of its content.")
    skip_rows: int = Field(0, ge=0, description="Leave out this many rows at the beginning.")
    max_rows: int | None = Field(None, ge=1, description="Read no more than this many rows.")
    licence: str | None = Field(None, description="Licence of these rows, for the data card.")


class TopicSourceConfig(Frozen):
    """Every topic with every task type, and with every persona if there are some."""

    kind: Literal["topics"]
    topics: tuple[str, ...] = Field(min_length=1, description="What is written about.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Kinds of task, such as 'explain', 'compare', 'rewrite'.")
    personas: tuple[str, ...] = Field((), description="Who asks; none: nobody in particular.")
    per_combination: int = Field(1, ge=1, description="Instructions of each combination.")
    max_similarity: float = Field(
        0.9, gt=0, le=1, description="Largest share of common words (Jaccard) with an earlier instruction."
    )
    template: str = Field("new_instruction", description="Template that asks for an instruction.")


class SeedSourceConfig(Frozen):
    """New instructions in the manner of given ones (self-instruct)."""

    kind: Literal["seeds"]
    path: str = Field(description="JSONL of seed instructions, column `instruction`.")
    rows: int = Field(ge=1, description="New instructions that are wanted.")
    examples: int = Field(3, ge=1, description="Seeds and earlier results that each prompt shows.")
    rounds: int = Field(4, ge=1, description="Rounds; in each one is asked for what is still missing.")
    max_similarity: float = Field(
        0.7, gt=0, le=1, description="Largest share of common words (Jaccard) with a seed or an earlier result."
    )
    template: str = Field("similar_instruction", description="Template that asks for a new instruction.")
    licence: str | None = Field(None, description="Licence of the seeds, for the data card.")


GenerateSourceConfig = Annotated[RowSourceConfig | TopicSourceConfig | SeedSourceConfig, Field(discriminator="kind")]


class EmbeddedBackendConfig(Frozen):
    """A model of this job, in shards or whole on every rank, written with by transformers."""

    kind: Literal["embedded"] = "embedded"
    model: str = Field(description="Hugging Face folder or hub name.")
    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships.")
    deepspeed: str = Field(description="ds_configs file with the model's placement.")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Dtype of weights and compute.")
    attention: Literal["sdpa", "flash_attention_2", "eager"] = Field("sdpa", description="Attention implementation.")
    gather: Literal["whole", "streamed", "auto"] = Field("auto", description="As rollouts.gather of a run.")
    batch_size: int = Field(16, ge=1, description="Answers that a rank writes at the same time.")
    licence: str | None = Field(None, description="Licence of the model's texts, for the data card.")


class EndpointBackendConfig(Frozen):
    """An OpenAI-compatible server (chat completions). Rank 0 asks it; all limits are those of the whole job."""

    kind: Literal["endpoint"]
    url: str = Field(description="Base address, such as https://host/v1.")
    model: str = Field(description="Name that the server knows the model by.")
    key_variable: str | None = Field(
        None, description="Name of the environment variable with the key, never the key; null: none is sent."
    )
    allow_remote: bool = Field(False, description="Send prompts to a server that is not on this machine.")
    concurrency: int = Field(8, ge=1, le=1024, description="Requests at the same time.")
    requests_per_minute: float | None = Field(None, gt=0, description="Limit, attempts that failed included.")
    tokens_per_minute: float | None = Field(None, gt=0, description="Limit of prompt and written tokens together.")
    timeout_s: float = Field(120.0, gt=0, description="Seconds for one answer.")
    retries: int = Field(8, ge=0, description="Further attempts after 429, 5xx, a broken connection or answer.")
    longest_pause_s: float = Field(60.0, gt=0, description="Attempts are no further apart, unless the server says so.")
    stop_grace_s: float = Field(20.0, ge=0, description="Told to stop, wait this long for requests that are under way.")
    input_price: float = Field(0.0, ge=0, description="Cost of a million prompt tokens.")
    output_price: float = Field(0.0, ge=0, description="Cost of a million written tokens.")
    max_cost: float | None = Field(None, gt=0, description="Stop, saved, before this cost is exceeded; null: no limit.")
    length_parameter: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the server calls the longest answer."
    )
    dialect: Literal["openai", "vllm"] = Field(
        "openai",
        description="vllm: the server takes top_k and min_p too; openai: sampling with them is refused.",
    )
    logprobs: bool = Field(False, description="Ask for log-probabilities, for the mean of an answer's tokens.")
    omit: tuple[Literal["seed", "temperature", "top_p"], ...] = Field(
        (), description="Parameters that are not sent, for a server that refuses them."
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="Further fields of every request; nothing secret.")
    licence: str | None = Field(None, description="Licence or terms of the model's texts, for the data card.")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.key_variable is not None and not _VARIABLE.fullmatch(self.key_variable):
            # Said by a validator of the whole record, whose message does not show the value: it may be the key.
            raise ValueError("key_variable: is no name of an environment variable; the key itself must not be here")
        problems = [
            *address_problems(
                self.url,
                place="url",
                allow_remote=self.allow_remote,
                allow_key="allow_remote",
                token_key="key_variable",
            ),
            *(f"extra.{name}: the job sets this itself" for name in sorted(_OWNED & self.extra.keys())),
        ]
        if self.max_cost is not None and not self.input_price and not self.output_price:
            problems.append(f"max_cost = {self.max_cost}: needs input_price or output_price")
        if problems:
            raise ValueError("; ".join(problems))
        return self


_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_OWNED = frozenset(
    {"model", "messages", "n", "stream", "max_tokens", "max_completion_tokens", "logprobs"}
    | {"temperature", "top_p", "top_k", "min_p", "stop", "seed"}
)
"""Fields of a request that come from other keys."""


class VllmBackendConfig(Frozen):
    """vLLM in this process (needs the package vllm and a GPU); one rank."""

    kind: Literal["vllm"]
    model: str = Field(description="Hugging Face folder or hub name.")
    engine: dict[str, Any] = Field(default_factory=dict, description="Further arguments of vllm.LLM.")
    batch_size: int = Field(256, ge=1, description="Answers that are handed to vLLM, and committed, together.")
    licence: str | None = Field(None, description="Licence of the model's texts, for the data card.")


BackendConfig = Annotated[
    EmbeddedBackendConfig | EndpointBackendConfig | VllmBackendConfig, Field(discriminator="kind")
]


class PromptConfig(Frozen):
    """How a row becomes a conversation."""

    templates: tuple[str, ...] = Field(
        ("step_by_step",),
        min_length=1,
        description="Names of the package's, or .jinja files; each row gets all.",
    )
    system: str | None = Field(None, description="System message; null: the template's own, if any.")
    few_shot: str | None = Field(None, description="JSONL of worked examples (question, answer) that templates show.")
    few_shot_count: int = Field(3, ge=1, description="Examples that each prompt shows, drawn by the row.")
    revise: bool = Field(False, description="A further turn: criticise the answer and write a better one.")
    revise_template: str = Field("critique_and_revise", description="Template of that turn.")
    turns: int = Field(1, ge=1, le=16, description="Answers in a conversation; between them the model plays the user.")
    user_template: str = Field("user_turn", description="Template that asks for the user's next message.")
    variables: dict[str, str] = Field(default_factory=dict, description="Further values that templates may use.")


class SamplingConfig(Frozen):
    """How each answer is drawn. Sample i of a row has its own seed, of (seed, row, template, i)."""

    samples: int = Field(1, ge=1, description="Answers to each prompt.")
    temperature: float = Field(0.7, ge=0, description="Divides the logits; 0: always the likeliest token.")
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (), description="One per sample in turn; replaces the above."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the likeliest tokens that have this mass together.")
    top_k: int | None = Field(None, ge=1, description="Draw among this many likeliest tokens; null: among all.")
    min_p: float = Field(0.0, ge=0, lt=1, description="Draw among tokens with at least this share of the likeliest's.")
    max_new_tokens: int = Field(512, ge=1, description="Longest answer.")
    max_prompt_tokens: int = Field(
        2048,
        ge=1,
        description="Longer prompts are kept as failed rows with the reason; may be raised later, with retry_failed.",
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts that end an answer; they are cut off."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all draws.")


class JudgeConfig(Frozen):
    """A model that judges the answers, as a job of its own after them."""

    backend: BackendConfig | None = Field(None, description="What judges; null: what wrote.")
    answers: Literal["unknown", "all"] = Field(
        "unknown",
        description="unknown: those about which curation.verify has no verdict. all: every one. Not those "
        "that curation drops in any case, such as unfinished ones.",
    )
    template: str = Field("judge", description="Template that shows question, answer and text.")
    variables: dict[str, str] = Field(default_factory=dict, description="Further values that the template may use.")
    samples: int = Field(1, ge=1, description="Judgements of each answer; the verdict of most of them counts.")
    temperature: float = Field(0.0, ge=0, description="Divides the judge's logits; 0: always the likeliest token.")
    max_new_tokens: int = Field(512, ge=1, description="Longest judgement.")
    max_prompt_tokens: int = Field(4096, ge=1, description="Longer prompts are not judged.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the draws.")

    @property
    def sampling(self) -> SamplingConfig:
        """How the judge writes, as a backend takes it."""
        return SamplingConfig(
            samples=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            seed=self.seed,
        )


class GenerateOutputConfig(Frozen):
    """Where everything is written."""

    dir: str = Field(description="Folder of the job; an unfinished one in it is continued.")
    fresh: bool = Field(False, description="Move an earlier job in the folder aside and start anew.")
    retry_failed: bool = Field(
        False, description="Ask again for what failed in earlier starts; the newest answer counts."
    )
    shard_rows: int = Field(256, ge=1, description="Answers in one committed file.")
    commit_s: float = Field(30.0, gt=0, description="Seconds after which what is finished is committed.")


class GenerateConfig(Frozen):
    """One YAML file recipes/generate_*.yaml is one of these. A source without a kind is rows, a backend embedded."""

    default_kinds: ClassVar[dict[str, str]] = {"source": "rows", "backend": "embedded"}

    output: GenerateOutputConfig
    source: GenerateSourceConfig
    backend: BackendConfig
    prompts: PromptConfig = Field(default_factory=PromptConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    judge: JudgeConfig | None = Field(None, description="A model that judges answers; null: rules alone.")
    curation: CurationConfig = Field(default_factory=CurationConfig)
    collective_timeout_s: int = Field(1800, ge=5, description="Seconds after which a silent rank counts as hung.")
    log: LogConfig = Field(default_factory=LogConfig)
