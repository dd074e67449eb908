"""What the student reads."""

from typing import Any, Literal

from pydantic import Field, model_validator

from largekd.config.common import Frozen


class SourceConfig(Frozen):
    """A data set; written as a string it is the path alone."""

    path: str = Field(description="File, folder or glob of .jsonl/.json/.parquet/.txt, or a hub data set's name.")
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    text_field: str = Field("text", description="Column with plain text.")
    messages_field: str = Field("messages", description="Column with chat messages; used when it exists.")
    loss_on: Literal["assistant", "all"] = Field("assistant", description="Chat tokens that carry the loss.")
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template.")
    max_samples: int | None = Field(None, ge=1, description="Read no more than this many records.")
    max_bad_frac: float = Field(
        0.0, ge=0, le=1, description="Share of unusable records that is set aside; above it the run aborts."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(Frozen):
    """Training and held-out data and how samples become rows."""

    train: SourceConfig = Field(description="Training data.")
    eval: SourceConfig | None = Field(None, description="Held-out data; null: no evaluation.")
    packing: bool = Field(True, description="Fill each row with several samples that do not see each other.")
    shuffle: bool = Field(True, description="A new seeded order in every epoch.")
    num_proc: int | None = Field(None, ge=1, description="Processes that tokenize; null: one.")


class EvalConfig(Frozen):
    """When and how much to evaluate."""

    every_steps: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after training.")
    max_rows: int | None = Field(None, ge=1, description="Evaluate this many rows; null: all.")
    micro_batch_size: int | None = Field(None, ge=1, description="Rows per forward; null: train.micro_batch_size.")
