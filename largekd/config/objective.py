"""What the student is asked to match: (1 - alpha) * CE + alpha * temperature^2 * divergences + alignment terms."""

from pydantic import Field

from largekd.config.alignment import AttentionConfig, FeatureConfig
from largekd.config.common import Frozen
from largekd.config.deep_supervision import DeepSupervisionConfig
from largekd.config.divergence import (
    DivergenceConfig,
    ForwardKLConfig,
    FullSignalConfig,
    SelectionConfig,
    SignalConfig,
    TranslationConfig,
)
from largekd.config.router import RouterConfig
from largekd.config.schedule import Scheduled


class ObjectiveConfig(Frozen):
    """The blend of terms; those over the vocabulary are evaluated in one pass over the student's logits."""

    alpha: Scheduled = Field(0.5, description="Share of the divergences; 1 - alpha goes to cross-entropy.")
    temperature: Scheduled = Field(1.0, description="Divides both models' logits in the divergences.")
    divergences: tuple[DivergenceConfig, ...] = Field(
        (ForwardKLConfig(name="forward_kl"),), description="The distillation terms."
    )
    signal: SignalConfig = Field(default_factory=FullSignalConfig, description="How much of the teacher is read.")
    selection: SelectionConfig | None = Field(None, description="Tokens that the divergences use; null: all.")
    translation: TranslationConfig | None = Field(
        None, description="For a teacher with another tokenizer; null: the tokenizers must be the same."
    )
    features: tuple[FeatureConfig, ...] = Field((), description="Alignment of hidden states.")
    attention: tuple[AttentionConfig, ...] = Field((), description="Alignment of attention.")
    deep_supervision: DeepSupervisionConfig | None = Field(
        None, description="Intermediate layers that are trained on the vocabulary terms too; null: none."
    )
    router: RouterConfig | None = Field(
        None, description="Terms over the router of a mixture-of-experts student; null: none."
    )
    chunk_tokens: int = Field(512, ge=1, description="Tokens whose logits exist at one time.")
    compile: bool = Field(False, description="Compile the row function of the vocabulary pass (torch.compile).")
