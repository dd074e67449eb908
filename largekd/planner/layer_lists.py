"""Keys of a config.json that say something of each layer, for another number of layers."""

from collections.abc import Mapping, Sequence
from typing import Any

# Every n-th layer sees everything, where config.json is silent.
_PATTERNS = {"gemma2": 2, "gemma3_text": 6}
_WINDOWED = ("mistral", "mixtral", "phi3", "qwen3_moe")


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """What each layer attends to: full_attention or sliding_attention."""
    depth, model_type = config["num_hidden_layers"], config["model_type"]
    if config.get("layer_types"):
        return list(config["layer_types"])
    full, sliding = "full_attention", "sliding_attention"
    window = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if model_type in _PATTERNS:
        every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PATTERNS[model_type]
        return [full if (index + 1) % every == 0 else sliding for index in range(depth)]
    if model_type in _WINDOWED:
        return [sliding if window else full] * depth
    if model_type in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        first = config.get("max_window_layers", 28)
        return [sliding if window and index >= first else full for index in range(depth)]
    return [full] * depth


def without_experts(config: Mapping[str, Any]) -> list[bool]:
    """Of each layer of a mixture, whether it is an ordinary MLP."""
    step, dense = config.get("decoder_sparse_step") or 1, set(config.get("mlp_only_layers") or ())
    return [index in dense or (index + 1) % step != 0 for index in range(config["num_hidden_layers"])]


def named_without_experts(is_dense: Sequence[bool]) -> dict[str, Any]:
    """The keys that say which layers of a mixture are ordinary MLPs, one by one: a step would count them anew."""
    return {"mlp_only_layers": [index for index, flag in enumerate(is_dense) if flag], "decoder_sparse_step": 1}


def shortened(values: Sequence[Any], *, depth: int) -> list[Any]:
    """A per-layer list for `depth` layers.

    A repeated pattern stays one, from the first layer on; any other list is taken in proportion. A kind of layer that
    would be lost becomes the last layer.
    """
    if depth == len(values):
        return list(values)
    period = next((p for p in range(1, len(values) // 2 + 1) if _repeats(values, period=p)), None)
    if period is None:
        kept = [values[index * len(values) // depth] for index in range(depth)]
    else:
        kept = [values[index % period] for index in range(depth)]
    lost = [value for value in dict.fromkeys(values) if value not in kept]
    if lost and depth > 1:
        kept[-1] = lost[-1]
    return kept


def with_depth(config: Mapping[str, Any], *, depth: int) -> dict[str, Any]:
    """The config.json with `depth` layers, its per-layer keys shortened with it."""
    before = config["num_hidden_layers"]
    changed = dict(config) | {"num_hidden_layers": depth}
    if depth == before:
        return changed
    if "layer_types" in config or config["model_type"] in _PATTERNS:
        changed["layer_types"] = shortened(layer_types(config), depth=depth)
    if config.get("no_rope_layers"):
        changed["no_rope_layers"] = shortened(config["no_rope_layers"], depth=depth)
    if "mlp_only_layers" in config or "decoder_sparse_step" in config:
        is_dense = without_experts(config)
        kept = shortened(is_dense, depth=depth)
        if depth == 1:
            kept = [all(is_dense)]
        changed |= named_without_experts(kept)
    if config.get("max_window_layers") is not None:
        changed["max_window_layers"] = min(depth, round(config["max_window_layers"] * depth / before))
    return changed


def _repeats(values: Sequence[Any], *, period: int) -> bool:
    return all(value == values[index % period] for index, value in enumerate(values))
