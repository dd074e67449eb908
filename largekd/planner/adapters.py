"""Sizes of low-rank adapters, from the shape of the model that they are added to."""

import re
from collections.abc import Iterator

from largekd.config.lora import LoraConfig
from largekd.planner.shapes import FAMILIES, ModelShape


def adapter_count(shape: ModelShape, *, config: LoraConfig | None) -> int:
    """Elements of all adapters, Σ R (I + O), with DoRA Σ R (I + O) + O, over what the pattern finds."""
    if config is None:
        return 0
    pattern, total = re.compile(config.pattern), 0
    for index in range(len(shape.layers)):
        for name, outputs, inputs in _linears(shape, index=index):
            if pattern.search(f"model.layers.{index}.{name}"):
                total += config.rank * (inputs + outputs) + (outputs if config.dora else 0)
    return total


def _linears(shape: ModelShape, *, index: int) -> Iterator[tuple[str, int, int]]:
    """(name, outputs, inputs) of a layer's linear layers. Fused experts and routers are none."""
    width, query, key = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    fused = FAMILIES[shape.model_type].fused
    if fused:
        yield "self_attn.qkv_proj", query + 2 * key, width
    else:
        yield "self_attn.q_proj", query, width
        yield "self_attn.k_proj", key, width
        yield "self_attn.v_proj", key, width
    yield "self_attn.o_proj", width, query
    if any(tensor.part == "experts" for tensor in shape.layers[index]):
        return
    # In a mixture of experts the shape's own figure counts the chosen experts.
    inner = max(tensor.numel for tensor in shape.layers[index] if tensor.part == "mlp") // width
    if fused:
        yield "mlp.gate_up_proj", inner, width
        yield "mlp.down_proj", width, inner // 2
    else:
        yield "mlp.gate_proj", inner, width
        yield "mlp.up_proj", inner, width
        yield "mlp.down_proj", width, inner
