"""Sizes of low-rank adapters, from the shape of the model that they are added to."""

import re
from collections.abc import Iterator

from largekd.config.lora import LoraConfig
from largekd.errors import ConfigError
from largekd.planner.shapes import FAMILIES, ModelShape

# Where a family's decoder layers are, and what it calls the linear layers; the others are like Llama.
_PATHS = {"gpt_neox": "gpt_neox.layers"}
_NAMES = {
    "gpt_neox": {
        "self_attn.qkv_proj": "attention.query_key_value",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
}


def adapter_count(shape: ModelShape, *, config: LoraConfig | None) -> int | None:
    """Elements of all adapters, Σ R (I + O), with DoRA Σ R (I + O) + O, over what the pattern finds; None without.

    Errors: ConfigError for a pattern that finds nothing.
    """
    if config is None:
        return None
    pattern, total = re.compile(config.pattern), 0
    path, names = _PATHS.get(shape.model_type, "model.layers"), _NAMES.get(shape.model_type, {})
    for index in range(len(shape.layers)):
        for name, outputs, inputs in _linears(shape, index=index):
            if pattern.search(f"{path}.{index}.{names.get(name, name)}"):
                total += config.rank * (inputs + outputs) + (outputs if config.dora else 0)
    if not total:
        first = ", ".join(f"{path}.0.{names.get(name, name)}" for name, _, _ in _linears(shape, index=0))
        raise ConfigError(
            f"student.lora.pattern = {config.pattern!r}: finds no linear layer of a {shape.model_type!r} model, whose "
            f"first layer has {first}."
        )
    return total


def _linears(shape: ModelShape, *, index: int) -> Iterator[tuple[str, int, int]]:
    """(name in Llama's words, outputs, inputs) of a layer's linear layers. Fused experts and routers are none."""
    width, query, key = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if FAMILIES[shape.model_type].fused:
        yield "self_attn.qkv_proj", query + 2 * key, width
    else:
        yield "self_attn.q_proj", query, width
        yield "self_attn.k_proj", key, width
        yield "self_attn.v_proj", key, width
    yield "self_attn.o_proj", width, query
    if any(tensor.part == "experts" for tensor in shape.layers[index]):
        return
    # In a mixture of experts the shape's own figure counts the chosen experts.
    matrix = max(tensor.numel for tensor in shape.layers[index] if tensor.part == "mlp") // width
    if not shape.gated:
        yield "mlp.up_proj", matrix, width
        yield "mlp.down_proj", width, matrix
    elif FAMILIES[shape.model_type].fused:
        yield "mlp.gate_up_proj", matrix, width
        yield "mlp.down_proj", width, matrix // 2
    else:
        yield "mlp.gate_proj", matrix, width
        yield "mlp.up_proj", matrix, width
        yield "mlp.down_proj", width, matrix
