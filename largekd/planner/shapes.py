"""Exact parameter counts of decoder-only models, from the figures in a Hugging Face config.json.

A tensor here is one parameter as transformers 5 stores it (experts of a layer are one fused parameter), because that is
the unit that ZeRO-3 shards and gathers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from largekd.planner.errors import PlanUnavailableError

Part = Literal["embedding", "attention", "mlp", "router", "experts", "norm", "head", "adapter"]


@dataclass(frozen=True)
class Tensor:
    """One parameter: the part of the model it belongs to and its number of elements."""

    part: Part
    numel: int


@dataclass(frozen=True)
class Family:
    """What a model_type fixes by code rather than by its config.json.

    `flag_on`: attention_bias is true where config.json does not say. `derives_head_dim`: hidden_size over heads, with
    no key of its own. `divides_width`: transformers refuses heads that do not divide hidden_size, though head_dim has a
    key. `grouped`: several query heads may share a key head.
    """

    bias: Literal["never", "qkv", "flag", "flag_on"] = "flag"
    mlp_bias: Literal["never", "flag", "always"] = "never"
    gated: bool = True
    norm_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    norms: int = 2
    fused: bool = False
    grouped: bool = True
    tied: bool = False
    head_dim: int | None = None
    derives_head_dim: bool = False
    divides_width: bool = False
    mixture: bool = False
    expert_width_key: str = "intermediate_size"


FAMILIES: dict[str, Family] = {
    "llama": Family(mlp_bias="flag", divides_width=True),
    "granite": Family(mlp_bias="flag"),
    "smollm3": Family(mlp_bias="flag", tied=True),
    "mistral": Family(bias="never"),
    "qwen2": Family(bias="qkv"),
    "qwen3": Family(qk_norm="head", head_dim=128),
    "phi3": Family(bias="never", fused=True, derives_head_dim=True),
    "olmo2": Family(qk_norm="width", derives_head_dim=True),
    "gpt_neox": Family(
        bias="flag_on",
        mlp_bias="always",
        gated=False,
        norm_bias=True,
        fused=True,
        grouped=False,
        derives_head_dim=True,
    ),
    "gemma": Family(tied=True, head_dim=256),
    "gemma2": Family(norms=4, tied=True, head_dim=256, divides_width=True),
    "gemma3_text": Family(norms=4, qk_norm="head", tied=True, head_dim=256, divides_width=True),
    "mixtral": Family(bias="never", mixture=True),
    "olmoe": Family(qk_norm="width", mixture=True, derives_head_dim=True),
    "qwen3_moe": Family(qk_norm="head", mixture=True, expert_width_key="moe_intermediate_size"),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder. `layers` holds each layer's tensors; `outer` those outside the layers."""

    model_type: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    tied: bool
    qk_norm: bool
    max_positions: int | None
    expert_count: int
    active_experts: int
    outer: tuple[Tensor, ...]
    layers: tuple[tuple[Tensor, ...], ...]
    gated: bool = True

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Every parameter of the model, a tied head once."""
        yield from self.outer
        for layer in self.layers:
            yield from layer

    @property
    def parameter_count(self) -> int:
        """All parameters, a tied head once."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def active_parameter_count(self) -> int:
        """The parameters that one token meets: of the experts, the chosen ones."""
        idle = 1 - self.active_experts / self.expert_count if self.expert_count else 0.0
        return self.parameter_count - round(self.count_of("experts") * idle)

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest layer."""
        return max((sum(tensor.numel for tensor in layer) for layer in self.layers), default=0)

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest single parameter."""
        return max(tensor.numel for tensor in self.tensors)

    def count_of(self, part: Part) -> int:
        """Parameters of one part of the model."""
        return sum(tensor.numel for tensor in self.tensors if tensor.part == part)

    def with_layers(self, indices: Sequence[int]) -> "ModelShape":
        """The model with only these layers; an index beyond the depth is an IndexError."""
        return replace(self, layers=tuple(self.layers[index] for index in indices))


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json.

    Errors: PlanUnavailableError for a family that is not in FAMILIES or a config without one of the figures.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise PlanUnavailableError(
            f"model_type {model_type!r} is not one the planner can count ({', '.join(FAMILIES)})"
        )
    try:
        return _read(config, model_type=model_type, family=family)
    except (KeyError, TypeError) as error:
        raise PlanUnavailableError(f"the config.json of a {model_type} model has no usable {error}") from error


def _read(config: Mapping[str, Any], *, model_type: str, family: Family) -> ModelShape:
    width, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    tied = config.get("tie_word_embeddings")
    tied = family.tied if tied is None else tied
    experts = (config.get("num_experts") or config["num_local_experts"]) if family.mixture else 0
    active = config["num_experts_per_tok"] if experts else 0
    shape = ModelShape(
        model_type=model_type,
        width=width,
        heads=heads,
        kv_heads=(config.get("num_key_value_heads") or heads) if family.grouped else heads,
        head_dim=config.get("head_dim") or family.head_dim or width // heads,
        mlp_width=config[family.expert_width_key] * active if experts else config["intermediate_size"],
        vocab_size=vocab,
        tied=tied,
        qk_norm=family.qk_norm != "none",
        max_positions=config.get("max_position_embeddings"),
        expert_count=experts,
        active_experts=active,
        outer=(
            Tensor("embedding", vocab * width),
            *[Tensor("norm", width)] * (2 if family.norm_bias else 1),
            *([] if tied else [Tensor("head", vocab * width)]),
        ),
        layers=(),
        gated=family.gated,
    )
    depth = config["num_hidden_layers"]
    layers = (
        (*_attention(shape, config, family=family), *_mlp(shape, config, family=family, index=index))
        for index in range(depth)
    )
    return replace(shape, layers=tuple(layers))


def _attention(shape: ModelShape, config: Mapping[str, Any], *, family: Family) -> Iterator[Tensor]:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    on = family.bias == "flag_on"
    flagged = family.bias in ("flag", "flag_on") and bool(config.get("attention_bias", on))
    projections = [query + 2 * key] if family.fused else [query, key, key]
    for rows in projections:
        yield Tensor("attention", rows * shape.width)
        if flagged or family.bias == "qkv":
            yield Tensor("attention", rows)
    yield Tensor("attention", query * shape.width)
    if flagged:
        yield Tensor("attention", shape.width)
    if family.qk_norm != "none":
        by_head = family.qk_norm == "head"
        yield Tensor("norm", shape.head_dim if by_head else query)
        yield Tensor("norm", shape.head_dim if by_head else key)
    for _ in range(family.norms * (2 if family.norm_bias else 1)):
        yield Tensor("norm", shape.width)


def _mlp(shape: ModelShape, config: Mapping[str, Any], *, family: Family, index: int) -> Iterator[Tensor]:
    if shape.expert_count and not _is_dense(config, index=index):
        inner = config[family.expert_width_key]
        yield Tensor("router", shape.expert_count * shape.width)
        yield Tensor("experts", shape.expert_count * 2 * inner * shape.width)
        yield Tensor("experts", shape.expert_count * inner * shape.width)
        return
    inner = config["intermediate_size"]
    biased = family.mlp_bias == "always" or (family.mlp_bias == "flag" and bool(config.get("mlp_bias")))
    entries = 2 if family.gated else 1
    for rows in [entries * inner] if family.fused else [inner] * entries:
        yield Tensor("mlp", rows * shape.width)
        if biased:
            yield Tensor("mlp", rows)
    yield Tensor("mlp", inner * shape.width)
    if biased:
        yield Tensor("mlp", shape.width)


def _is_dense(config: Mapping[str, Any], *, index: int) -> bool:
    """A layer of a mixture model may have an ordinary MLP (qwen3_moe)."""
    if index in (config.get("mlp_only_layers") or ()):
        return True
    return bool((index + 1) % (config.get("decoder_sparse_step") or 1))
