"""What a run leaves behind and how it reports."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen


class RunFolderConfig(Frozen):
    """The run folder."""

    dir: str = Field(description="Folder of this run; an unfinished run in it is resumed.")
    fresh: bool = Field(False, description="Move an earlier run in the folder aside and start from step 0.")


class CheckpointConfig(Frozen):
    """When to save and what to keep."""

    every_steps: int = Field(
        500, ge=0, description="Steps between checkpoints; 0: only when the run ends or is stopped."
    )
    keep: int = Field(2, ge=2, description="Newest complete checkpoints that are kept.")


class LogConfig(Frozen):
    """Where numbers go."""

    every_steps: int = Field(1, ge=1, description="Steps between two records in metrics.jsonl and TensorBoard.")
    health_every_steps: int = Field(10, ge=0, description="Steps between KD health figures; 0: only in evaluation.")
    term_gradients: bool = Field(
        False, description="With the health figures, also the norm of each term's gradient; one more pass per term."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    progress: bool = Field(True, description="Show a progress bar on rank 0.")
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe message shown.")


class ExportConfig(Frozen):
    """The Hugging Face folder written at the end."""

    weights: Literal["student", "teacher_average"] = Field(
        "student", description="teacher_average: the average of the student's weights that a teacher of kind ema is."
    )
    depth: int | None = Field(
        None, ge=2, description="Export only this many of the student's layers, chosen as for eval.depths; null: all."
    )
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="Dtype on disk; null: train.precision.")
    adapter: bool = Field(
        False, description="With student.lora, write the adapters to export/adapter too, as a peft folder."
    )
    max_shard_bytes: int = Field(2_000_000_000, ge=1_000_000, description="Largest safetensors file.")
