"""What a model costs once it is deployed: bytes of weights, of keys and values, and operations for a token."""

from collections.abc import Mapping
from typing import Any

from largekd.config.design import Storage
from largekd.planner.layer_lists import layer_types
from largekd.planner.shapes import ModelShape

BITS: Mapping[Storage, float] = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.5, "int4": 4.5}
"""Bits of a stored weight. int8 and int4 are ggml's q8_0 and q4_0: blocks of 32 weights with one 16-bit scale."""

_CACHE_BYTES = 2


def weight_bytes(shape: ModelShape, *, storage: Storage) -> int:
    """P · bits / 8, all tensors stored alike. Real quantised files keep norms, and often the head, at more bits."""
    return round(shape.parameter_count * BITS[storage] / 8)


def cache_bytes_per_token(shape: ModelShape) -> int:
    """2 · L · key heads · head size · 2 bytes: keys and values in 16 bits while no window is full."""
    return 2 * len(shape.layers) * shape.kv_heads * shape.head_dim * _CACHE_BYTES


def cache_bytes(config: Mapping[str, Any], *, shape: ModelShape, context_tokens: int) -> int:
    """Keys and values of one sequence; a layer with a window keeps no more tokens than that."""
    window = config.get("sliding_window") or context_tokens
    kinds = layer_types(config)
    tokens = sum(min(context_tokens, window) if kind == "sliding_attention" else context_tokens for kind in kinds)
    return 2 * tokens * shape.kv_heads * shape.head_dim * _CACHE_BYTES


def forward_flops(shape: ModelShape, *, context_tokens: int) -> int:
    """2 · M + 2 · L · Q · S: the forward pass of one token, averaged over a sequence of S = context_tokens.

    M: weights that multiply a token (active parameters without embedding and norms, with the head, tied or not);
    Q: query width. A token of a causal sequence meets S/2 others on average, 4 · Q operations each. Windows are not
    looked at: an upper estimate for families that have them.
    """
    head = shape.vocab_size * shape.width
    outside = shape.count_of("embedding") + shape.count_of("norm") + shape.count_of("head")
    multiplied = shape.active_parameter_count - outside + head
    query = shape.heads * shape.head_dim
    return 2 * multiplied + 2 * len(shape.layers) * query * context_tokens
