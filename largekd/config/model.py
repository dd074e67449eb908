"""Where the two models come from and where their weights are placed."""

from typing import Literal

from pydantic import Field

from largekd.config.common import Frozen
from largekd.config.design import DesignConfig
from largekd.config.initialise import InitialiseConfig
from largekd.config.layer_drop import LayerDropConfig
from largekd.config.lora import LoraConfig


class SourceModelConfig(Frozen):
    """Keys that every model loaded from a folder or the hub has."""

    revision: str | None = Field(None, description="Commit or tag of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships.")
    deepspeed: str = Field(description="ds_configs file with this model's placement.")
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] = Field(
        "sdpa", description="Attention implementation; flash_attention_2 needs a GPU and the flash-attn package."
    )


class StudentConfig(SourceModelConfig):
    """The trainable student: `design` alone, or `model`, else `config`, else the teacher's layers."""

    model: str | None = Field(None, description="Hugging Face folder or hub name; replaces the two keys below.")
    layers: tuple[int, ...] | None = Field(
        None, description="Indices of the layers of `model` that are kept; null: all of them."
    )
    config: str | None = Field(None, description="Hugging Face config.json (or its folder): random initialisation.")
    teacher_layers: tuple[int, ...] | None = Field(
        None, description="Indices of the teacher's layers that the student starts from; embeddings and norm too."
    )
    design: DesignConfig | None = Field(None, description="The teacher's family at a target size; no key above.")
    initialise: InitialiseConfig | None = Field(
        None, description="First weights of a student of `config` or `design`; null: random."
    )
    lora: LoraConfig | None = Field(None, description="Train adapters alone; null: all weights.")
    layer_drop: LayerDropConfig | None = Field(None, description="Leave layers out at random; null: never.")
