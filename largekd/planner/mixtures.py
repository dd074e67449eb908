"""From a dense family to the mixture family with the same layers, and back.

A pair is in the table only if a layer of one can compute what a layer of the other computes: same norms in the same
places, same biases, same rotary embedding, same activation. Then copied experts whose weights sum to 1 keep the dense
model's function.
"""

from collections.abc import Callable, Mapping
from typing import Any

from largekd.errors import ConfigError
from largekd.planner.shapes import FAMILIES

Named = Callable[[str], str]
"""A field of DesignConfig as the user writes it, for messages."""

DEFAULT_ACTIVE = 2

_MIXTURE_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
_DENSE_OF = {"mixtral": "mistral", "qwen3_moe": "qwen3"}
_CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_REFUSALS = {
    "qwen2": "it has biases on queries, keys and values alone, which no mixture family counted here can express",
    "gemma": "no mixture family has its scaled embedding and its GELU gate",
    "gemma2": "no mixture family has its four norms and its GELU gate",
    "gemma3_text": "no mixture family has its four norms and its GELU gate",
    "olmo2": "it normalises after attention and MLP, olmoe before them",
    "olmoe": "no dense family has its query and key norms together with norms before attention and MLP",
    "smollm3": "no mixture family has layers without rotary embedding",
    "phi3": "no mixture family has its fused projections",
    "granite": "no mixture family counted here has its multipliers",
    "gpt_neox": "no mixture family has its parallel residual, LayerNorms and ungated MLP",
}
# What transformers takes where config.json is silent; the two families of a pair differ in them.
_ROTARY = {"rope_theta": 10000.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "sliding_window": None, **_ROTARY},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096, **_ROTARY},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, **_ROTARY},
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
    },
    "qwen3_moe": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 4, **_ROTARY},
}
_MIXTURE_KEYS = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
# Per-layer keys that the other family of a pair does not read.
_DENSE_KEYS = ("layer_types", "max_window_layers", "pretraining_tp", "mlp_bias")


def with_experts(
    teacher: Mapping[str, Any], *, experts: int | None, active: int | None, named: Named
) -> dict[str, Any]:
    """The teacher's config.json in the family that has this many experts (0: none; None: as the teacher).

    Errors: ConfigError for a family without such a partner, and for counts that do not map.
    """
    model_type = str(teacher["model_type"])
    if FAMILIES[model_type].mixture:
        if experts == 0:
            return _dense(teacher, model_type=model_type, named=named)
        return _fewer(teacher, model_type=model_type, experts=experts, active=active, named=named)
    if experts is None:
        if active is not None:
            raise ConfigError(
                f"{named('active_experts')} = {active}: the teacher is dense; set {named('experts')} too."
            )
        return dict(teacher)
    if experts == 0:
        raise ConfigError(f"{named('experts')} = 0: the teacher ({model_type}) is dense already; remove it.")
    return _mixture(teacher, model_type=model_type, experts=experts, active=active, named=named)


def _fewer(
    teacher: Mapping[str, Any], *, model_type: str, experts: int | None, active: int | None, named: Named
) -> dict[str, Any]:
    total = teacher.get("num_experts") or teacher["num_local_experts"]
    kept = total if experts is None else experts
    chosen = min(teacher["num_experts_per_tok"], kept) if active is None else active
    if kept > total:
        raise ConfigError(
            f"{named('experts')} = {kept}: the teacher has {total} experts a layer and a student of it cannot have "
            f"more; give at most {total}."
        )
    if chosen > kept:
        raise ConfigError(f"{named('active_experts')} = {chosen}: must be at most the {kept} experts of a layer.")
    config = {key: value for key, value in teacher.items() if key not in ("num_experts", "num_local_experts")}
    return config | {_count_key(model_type): kept, "num_experts_per_tok": chosen}


def _mixture(
    teacher: Mapping[str, Any], *, model_type: str, experts: int, active: int | None, named: Named
) -> dict[str, Any]:
    partner = _partner(_MIXTURE_OF, model_type=model_type, named=named, experts=experts)
    activation = teacher.get("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        # qwen3_moe has biases on the same four projections.
        if teacher.get(key) and not (partner == "qwen3_moe" and key == "attention_bias"):
            raise ConfigError(
                f"{named('experts')} = {experts}: a {partner} layer has no {key}, which the teacher sets."
            )
    if activation != "silu":
        raise ConfigError(f"{named('experts')} = {experts}: the teacher's activation is {activation!r}, not 'silu'.")
    chosen = min(DEFAULT_ACTIVE, experts) if active is None else active
    if chosen > experts:
        raise ConfigError(f"{named('active_experts')} = {chosen}: must be at most {named('experts')} = {experts}.")
    config = _translated(teacher, model_type=model_type, partner=partner)
    config |= {_count_key(partner): experts, "num_experts_per_tok": chosen}
    if partner == "qwen3_moe":
        config |= {"moe_intermediate_size": teacher["intermediate_size"], "mlp_only_layers": []}
        config |= {"decoder_sparse_step": 1, "norm_topk_prob": True}
    return config


def _dense(teacher: Mapping[str, Any], *, model_type: str, named: Named) -> dict[str, Any]:
    partner = _partner(_DENSE_OF, model_type=model_type, named=named, experts=0)
    if teacher.get("use_sliding_window"):
        raise ConfigError(f"{named('experts')} = 0: {partner} does not use the window in the same layers.")
    config = _translated(teacher, model_type=model_type, partner=partner)
    # As wide as the experts that one token meets: the same work for a token.
    expert_width = teacher[FAMILIES[model_type].expert_width_key]
    return config | {"intermediate_size": expert_width * teacher["num_experts_per_tok"]}


def _partner(table: Mapping[str, str], *, model_type: str, named: Named, experts: int) -> str:
    if model_type in table:
        return table[model_type]
    reason = _REFUSALS.get(model_type, "no such family is known")
    raise ConfigError(
        f"{named('experts')} = {experts}: a {model_type} teacher has no such student, because {reason}. "
        f"Families that do: {', '.join(table)}."
    )


def _translated(teacher: Mapping[str, Any], *, model_type: str, partner: str) -> dict[str, Any]:
    defaults = dict(_DEFAULTS[model_type])
    if "rope_parameters" in teacher or (teacher.get("rope_scaling") or {}).get("rope_theta"):
        defaults.pop("rope_theta")
    heads = teacher["num_attention_heads"]
    known = {"num_key_value_heads": heads, "tie_word_embeddings": FAMILIES[model_type].tied} | defaults
    config = {
        **known,
        **{key: value for key, value in teacher.items() if key not in (*_MIXTURE_KEYS, *_DENSE_KEYS)},
        "model_type": partner,
        "architectures": [_CLASSES[partner]],
    }
    family_dim = FAMILIES[model_type].head_dim
    config["head_dim"] = teacher.get("head_dim") or family_dim or teacher["hidden_size"] // heads
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    return config


def _count_key(model_type: str) -> str:
    return "num_local_experts" if model_type == "mixtral" else "num_experts"
