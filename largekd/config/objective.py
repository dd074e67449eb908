"""What the student is asked to match: (1 - alpha) * CE + alpha * temperature^2 * sum of weighted divergences."""

from typing import Annotated, Literal

from pydantic import Field

from largekd.config.common import Frozen


class ForwardKLConfig(Frozen):
    """KL(teacher || student)."""

    name: Literal["forward_kl"]
    weight: float = Field(1.0, ge=0, description="Factor inside the sum of divergences.")


class ReverseKLConfig(Frozen):
    """KL(student || teacher)."""

    name: Literal["reverse_kl"]
    weight: float = Field(1.0, ge=0, description="Factor inside the sum of divergences.")


class JSDConfig(Frozen):
    """mix * KL(teacher || m) + (1 - mix) * KL(student || m) with m = mix * teacher + (1 - mix) * student."""

    name: Literal["jsd"]
    weight: float = Field(1.0, ge=0, description="Factor inside the sum of divergences.")
    mix: float = Field(0.5, gt=0, lt=1, description="The teacher's share in the mixture.")


DivergenceConfig = Annotated[ForwardKLConfig | ReverseKLConfig | JSDConfig, Field(discriminator="name")]


class ObjectiveConfig(Frozen):
    """The blend of terms, all evaluated in one pass over the student's logits."""

    alpha: float = Field(0.5, ge=0, le=1, description="Share of the divergences; 1 - alpha goes to cross-entropy.")
    temperature: float = Field(1.0, gt=0, description="Divides both models' logits in the divergences.")
    divergences: tuple[DivergenceConfig, ...] = Field(
        (ForwardKLConfig(name="forward_kl"),), description="The distillation terms."
    )
    chunk_tokens: int = Field(512, ge=1, description="Tokens whose logits exist at one time.")
    compile: bool = Field(False, description="Compile the row function of the vocabulary pass (torch.compile).")
