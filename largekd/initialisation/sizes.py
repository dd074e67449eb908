"""How long each axis of a model is, by its Hugging Face configuration."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from largekd.initialisation.axes import Role
from largekd.planner.layer_lists import without_experts


@dataclass(frozen=True)
class Sizes:
    """Counts by role: hidden units, neurons of an MLP (of one expert where there are some), heads, tokens."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int
    mlps: tuple[int, ...] = ()
    """Neurons of each layer's MLP, or of one of its experts; empty: `ffn` in every layer."""

    def neurons(self, layer: int) -> int:
        """Neurons of this layer's MLP, or of one of its experts."""
        return self.mlps[layer] if self.mlps else self.ffn

    def of(self, role: Role) -> int:
        """The count of `role`."""
        counts: dict[Role, int] = {
            "width": self.width,
            "ffn": self.ffn,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "vocabulary": self.vocabulary,
        }
        return counts[role]


def sizes_of(config: PretrainedConfig) -> Sizes:
    """The counts of the model that `config` describes."""
    heads = int(config.num_attention_heads)
    ordinary, width = int(config.intermediate_size), getattr(config, "moe_intermediate_size", None)
    plain = without_experts(config.to_dict()) if width else ()
    return Sizes(
        layers=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        ffn=int(width or ordinary),
        mlps=tuple(ordinary if is_plain else int(width) for is_plain in plain) if width else (),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        vocabulary=int(config.vocab_size),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )
