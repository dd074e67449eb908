"""What each dimension of a parameter counts, by the parameter's Hugging Face name."""

import re
from dataclasses import dataclass

from largekd.initialisation.axes import Role


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor: one role, or several roles' entries one after another (fused projections).

    None: entries that are the same in teacher and student, such as the ones inside a head, or experts.
    per_head: how many times head_dim entries each head has along this dimension; 0: one entry.
    """

    roles: tuple[Role | None, ...]
    per_head: int = 1

    @property
    def role(self) -> Role | None:
        """The only role; None for a fused or an unchanged dimension."""
        return self.roles[0] if len(self.roles) == 1 else None


WIDTH, FFN, VOCABULARY = Axis(("width",)), Axis(("ffn",)), Axis(("vocabulary",))
HEADS, KV_HEADS, SAME = Axis(("heads",)), Axis(("kv_heads",)), Axis((None,))

# Of families whose query and key norms span all heads at once.
_WHOLE_NORMS = frozenset({"olmo2", "olmo3", "olmoe", "flex_olmo"})
# Theirs hold a weight for each head.
_NORMS_BY_HEAD = frozenset({"cohere", "cohere2"})

_ATTENTION = r"(?:self_attn|attention|attn)"
_RULES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (rf"{_ATTENTION}\.q_proj\.weight", (HEADS, WIDTH)),
    (rf"{_ATTENTION}\.q_proj\.bias", (HEADS,)),
    (rf"{_ATTENTION}\.[kv]_proj\.weight", (KV_HEADS, WIDTH)),
    (rf"{_ATTENTION}\.[kv]_proj\.bias", (KV_HEADS,)),
    (rf"{_ATTENTION}\.(?:o_proj|dense)\.weight", (WIDTH, HEADS)),
    (rf"{_ATTENTION}\.(?:o_proj|dense)\.bias", (WIDTH,)),
    (rf"{_ATTENTION}\.qkv_proj\.weight", (Axis(("heads", "kv_heads", "kv_heads")), WIDTH)),
    (rf"{_ATTENTION}\.query_key_value\.weight", (Axis(("heads",), per_head=3), WIDTH)),
    (rf"{_ATTENTION}\.query_key_value\.bias", (Axis(("heads",), per_head=3),)),
    (r"mlp\.(?:gate_proj|up_proj|fc1|dense_h_to_4h)\.weight", (FFN, WIDTH)),
    (r"mlp\.(?:gate_proj|up_proj|fc1|dense_h_to_4h)\.bias", (FFN,)),
    (r"mlp\.gate_up_proj\.weight", (Axis(("ffn", "ffn")), WIDTH)),
    (r"mlp\.(?:down_proj|fc2|dense_4h_to_h)\.weight", (WIDTH, FFN)),
    (r"mlp\.(?:down_proj|fc2|dense_4h_to_h)\.bias", (WIDTH,)),
    (r"mlp\.experts\.gate_up_proj", (SAME, Axis(("ffn", "ffn")), WIDTH)),
    (r"mlp\.experts\.down_proj", (SAME, WIDTH, FFN)),
    (r"mlp\.(?:gate|router|shared_expert_gate)\.weight", (SAME, WIDTH)),
    (r"mlp\.shared_expert\.(?:gate_proj|up_proj)\.weight", (SAME, WIDTH)),
    (r"mlp\.shared_expert\.down_proj\.weight", (WIDTH, SAME)),
    (r"\w*(?:norm|ln_\w)\w*\.(?:weight|bias)", (WIDTH,)),
)
_OUTSIDE: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (r"(?:.+\.)?(?:embed_tokens|embed_in)\.weight", (VOCABULARY, WIDTH)),
    (r"(?:lm_head|embed_out)\.weight", (VOCABULARY, WIDTH)),
    (r"(?:lm_head|embed_out)\.bias", (VOCABULARY,)),
    (r"(?:.+\.)?(?:norm|final_layernorm|final_layer_norm|final_norm)\.(?:weight|bias)", (WIDTH,)),
)


def split_layer(name: str, *, layers_path: str) -> tuple[int, str] | None:
    """The layer a parameter belongs to and its name inside that layer; None outside of the layers."""
    if not name.startswith(f"{layers_path}."):
        return None
    index, rest = name[len(layers_path) + 1 :].split(".", 1)
    return int(index), rest


def axes_of(name: str, *, model_type: str, layers_path: str) -> tuple[Axis, ...] | None:
    """The role of each dimension of the parameter `name`; None where no rule is known.

    layers_path: dotted name of the list of decoder layers.
    """
    inside = split_layer(name, layers_path=layers_path)
    if inside is None:
        return _first(_OUTSIDE, name)
    norm = re.fullmatch(rf"{_ATTENTION}\.(q|k)_norm\.(?:weight|bias)", inside[1])
    if norm is not None:
        return _query_key_norm(HEADS if norm[1] == "q" else KV_HEADS, model_type=model_type)
    return _first(_RULES, inside[1])


def _query_key_norm(heads: Axis, *, model_type: str) -> tuple[Axis, ...]:
    if model_type in _WHOLE_NORMS:
        return (heads,)
    if model_type in _NORMS_BY_HEAD:
        return (Axis(heads.roles, per_head=0), SAME)
    return (SAME,)


def _first(rules: tuple[tuple[str, tuple[Axis, ...]], ...], name: str) -> tuple[Axis, ...] | None:
    return next((axes for pattern, axes in rules if re.fullmatch(pattern, name)), None)
