"""Adapters instead of all weights."""

from pydantic import Field

from largekd.config.common import Frozen


class LoraConfig(Frozen):
    """Low-rank adapters on a frozen student (needs the extra `lora`); merged into its weights at export."""

    rank: int = Field(16, ge=1, description="Rank of each adapter.")
    alpha: float = Field(32.0, gt=0, description="The update is alpha / rank * B A.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A.")
    dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")
    pattern: str = Field(
        r"(q|k|v|o|gate|up|down)_proj$", description="Regular expression, searched in the names of linear layers."
    )
