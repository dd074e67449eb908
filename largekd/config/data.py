"""What the student reads."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from largekd.config.common import Frozen


class SpanWeightConfig(Frozen):
    """Characters of assistant answers from `start` to `end`, every time they occur, and their tokens' weight."""

    start: str = Field(min_length=1, description="Text that opens the span, such as <think> or ####.")
    end: str | None = Field(
        None, min_length=1, description="Text that closes it; null, or not found: the answer's end."
    )
    weight: float = Field(ge=0, description="Weight of its tokens; all others have 1.")
    include_markers: bool = Field(True, description="Whether `start` and `end` have that weight too.")


class SourceConfig(Frozen):
    """A data set; written as a string it is the path alone."""

    path: str = Field(description="File, folder or glob of .jsonl/.json/.parquet/.txt, or a hub data set's name.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    text_field: str = Field("text", description="Column with plain text.")
    messages_field: str = Field("messages", description="Column with chat messages; used when it exists.")
    loss_on: Literal["assistant", "all"] = Field("assistant", description="Chat tokens that carry the loss.")
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template.")
    weight_field: str | None = Field(
        None, description="Column with a weight per record, at least 0, on all of its tokens; null: all records have 1."
    )
    span_weights: tuple[SpanWeightConfig, ...] = Field(
        (), description="Weights of parts of assistant answers; a later entry wins over an earlier one."
    )
    named_span_weights: dict[str, float] = Field(
        default_factory=dict,
        description="Weights, at least 0, of named parts of a conversation's last answer, such as reasoning and "
        "answer; a later name wins over an earlier one and over span_weights.",
    )
    spans_field: str = Field(
        "spans",
        description="Column with these parts, a list of {name, start, end} in characters of the last assistant "
        "message's content; read only for named_span_weights.",
    )
    skip_samples: int = Field(0, ge=0, description="Leave out this many records at the beginning.")
    max_samples: int | None = Field(None, ge=1, description="Read no more than this many records.")
    max_bad_frac: float = Field(
        0.0, ge=0, le=1, description="Share of unusable records that is set aside; above it the run aborts."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("named_span_weights")
    @classmethod
    def _not_negative(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not name or not 0 <= weight < float("inf"):
                raise ValueError(f"{name!r} has weight {weight}: names need text, weights a number of at least 0")
        return value

    @field_validator("span_weights", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        # Behind a validator of the whole record, strict mode no longer takes JSON's lists for tuples.
        return tuple(value) if isinstance(value, list) else value


class MixedSourceConfig(Frozen):
    """A further training set and its part in the mixture."""

    source: SourceConfig = Field(description="Training data.")
    share: float | None = Field(None, gt=0, description="As mixture.share, of this source.")


class MixtureConfig(Frozen):
    """Several training sets, data.train first, drawn from in given or computed shares.

    Shares are of samples. An epoch has as many samples as all sources together; of each source it takes its share, and
    goes on in the next epoch where it stopped: no sample comes again before all of its source have come.
    """

    others: tuple[MixedSourceConfig, ...] = Field(min_length=1, description="The training sets beside data.train.")
    share: float | None = Field(
        None, gt=0, description="Part of data.train, relative to the sum of all; give all shares, or none."
    )
    temperature: float = Field(
        1.0, gt=0, description="T of shares in proportion to samples^(1/T), where none are given. 1: each sample once."
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> "MixtureConfig":
        given = [share is not None for share in (self.share, *(other.share for other in self.others))]
        if any(given) and not all(given):
            raise ValueError("must give the share of every source, that of data.train included, or none")
        if any(given) and self.temperature != 1.0:
            raise ValueError("has shares and a temperature, which would compute them; give only one of both")
        return self

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The given shares in order, None where the temperature decides."""
        given = [self.share, *(other.share for other in self.others)]
        return None if self.share is None else tuple(share for share in given if share is not None)


class DataConfig(Frozen):
    """Training and held-out data and how samples become rows."""

    train: SourceConfig = Field(description="Training data.")
    mixture: MixtureConfig | None = Field(None, description="Further training sets; null: data.train alone.")
    eval: SourceConfig | None = Field(None, description="Held-out data; null: no evaluation.")
    packing: bool = Field(True, description="Fill each row with several samples that do not see each other.")
    shuffle: bool = Field(True, description="A new seeded order in every epoch.")
    num_proc: int | None = Field(None, ge=1, description="Processes that tokenize; null: one.")

    @property
    def training_sources(self) -> tuple[tuple[str, SourceConfig], ...]:
        """Every training set with its key, data.train first."""
        others = self.mixture.others if self.mixture is not None else ()
        named = ((f"data.mixture.others.{place}.source", other.source) for place, other in enumerate(others))
        return (("data.train", self.train), *named)


class EvalConfig(Frozen):
    """When and how much to evaluate."""

    every_steps: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after training.")
    before: bool = Field(True, description="Evaluate before the first step too.")
    max_rows: int | None = Field(None, ge=1, description="Evaluate this many rows; null: all.")
    depths: tuple[int, ...] = Field(
        (), description="Also evaluate the student with only this many of its layers, evenly chosen."
    )
    micro_batch_size: int | None = Field(None, ge=1, description="Rows per forward; null: train.micro_batch_size.")
