"""The valid shapes between a full-size model and the smallest of its family.

Letters: L layers, D width, H query heads, G key heads, h size of a head, F width of the MLP or of each expert.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from largekd.config.design import DesignConfig
from largekd.errors import ConfigError
from largekd.planner.layer_lists import with_depth
from largekd.planner.mixtures import Named
from largekd.planner.shapes import FAMILIES, ModelShape

SLACK = 0.4
"""How far the MLP may leave its proportion to the width so that a target is met."""

BAND = 1.25
"""How far the shares of depth and width that are kept may differ with keep = balanced."""

# How far the number of query heads may leave its proportion so that the number of queries to a key head is kept.
_HEAD_SLACK = 0.3
_GROUP_WEIGHT = 1.5


@dataclass(frozen=True)
class Sizes:
    """What distinguishes two shapes of a family."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int


@dataclass(frozen=True)
class Space:
    """The shapes under a full-size model, with what the user fixed."""

    config: Mapping[str, Any]
    full: Sizes
    design: DesignConfig
    named: Named

    @property
    def derives_head_dim(self) -> bool:
        """The family has no key for the size of a head: it is the width over the heads."""
        return FAMILIES[self.config["model_type"]].derives_head_dim

    @property
    def refinable(self) -> bool:
        """Whether the MLP may leave its proportion: not where it is given, nor where whole layers are kept."""
        whole_layers = self.design.keep == "width" and self.design.layers is None
        return self.design.mlp_width is None and not whole_layers

    def shapes(self) -> Iterator[Sizes]:
        """Every shape of pure proportions. Errors: ConfigError when the given sizes cannot be together.

        With keep = balanced depth and width shrink alike, within a factor of BAND of each other.
        """
        depths = self._depths()
        for width in self._widths():
            ideal = self.full.layers * width / self.full.width
            banded = [depth for depth in depths if 1 / BAND <= depth / ideal <= BAND]
            if len(depths) == 1 or self.design.keep == "width" or self.design.width is not None:
                banded = depths
            for layers in banded or [min(depths, key=lambda depth: abs(depth - ideal))]:
                yield self.at(layers=layers, width=width)

    def at(self, *, layers: int, width: int) -> Sizes:
        """The shape of this depth and width, everything else in proportion."""
        heads, kv_heads, head_dim = self._heads(width)
        return Sizes(layers, width, heads, kv_heads, head_dim, self._mlp_width(width))

    def refined(self, sizes: Sizes) -> Iterator[Sizes]:
        """The shape with other MLP widths, from narrow to wide; the full model's is the widest."""
        step = grid_step(self.full.mlp_width)
        low, high = (1 - SLACK) * sizes.mlp_width, (1 + SLACK) * sizes.mlp_width
        for mlp_width in range(step, min(round(high), self.full.mlp_width) + 1, step):
            if mlp_width >= low:
                yield replace(sizes, mlp_width=mlp_width)

    def written(self, sizes: Sizes) -> dict[str, Any]:
        """The config.json of the shape."""
        family = FAMILIES[self.config["model_type"]]
        config = with_depth(self.config, depth=sizes.layers)
        config |= {"hidden_size": sizes.width, "num_attention_heads": sizes.heads}
        if family.grouped:
            config["num_key_value_heads"] = sizes.kv_heads
        if not self.derives_head_dim:
            config["head_dim"] = sizes.head_dim
        if family.expert_width_key != "intermediate_size":
            # Layers without experts keep their proportion to them.
            dense = config["intermediate_size"] * sizes.mlp_width // self.full.mlp_width
            config["intermediate_size"] = max(8, dense - dense % 8)
        config[family.expert_width_key] = sizes.mlp_width
        if self.design.tied is not None:
            config["tie_word_embeddings"] = self.design.tied
        return config

    def _depths(self) -> list[int]:
        if self.design.layers is not None:
            if self.design.layers > self.full.layers:
                raise ConfigError(
                    f"{self.named('layers')} = {self.design.layers}: the teacher has {self.full.layers}; give at most "
                    "that."
                )
            return [self.design.layers]
        if self.design.keep == "depth" or not _has_target(self.design):
            return [self.full.layers]
        return list(range(1, self.full.layers + 1))

    def _widths(self) -> list[int]:
        full, design = self.full, self.design
        if design.width is not None:
            if design.width > full.width:
                raise ConfigError(
                    f"{self.named('width')} = {design.width}: the teacher's is {full.width}; give at most that."
                )
            return [design.width]
        if design.keep == "width" or not _has_target(design):
            return [full.width]
        step = grid_step(full.width)
        if self.derives_head_dim:
            step = math.lcm(step, design.heads if design.heads is not None else full.head_dim)
        least = max(step, full.head_dim)
        return [*(width for width in range(step, full.width, step) if width >= least), full.width]

    def _mlp_width(self, width: int) -> int:
        if self.design.mlp_width is not None:
            return self.design.mlp_width
        if width == self.full.width:
            return self.full.mlp_width
        step = grid_step(self.full.mlp_width)
        return max(step, round(self.full.mlp_width * width / self.full.width / step) * step)

    def _heads(self, width: int) -> tuple[int, int, int]:
        """Query heads, key heads and the size of a head for a width."""
        full, design = self.full, self.design
        if design.heads is not None:
            heads = design.heads
            self._check_heads(heads, width=width)
        elif self.derives_head_dim:
            if width % full.head_dim:
                raise ConfigError(
                    f"{self.named('width')} = {width}: {self.config['model_type']} takes hidden_size / heads as the "
                    f"size of a head, which stays {full.head_dim}; give a multiple of it, or {self.named('heads')} too."
                )
            heads = width // full.head_dim
        else:
            divided = width if FAMILIES[self.config["model_type"]].divides_width else None
            heads, _ = nearest_heads(full.heads * width / full.width, full=full, divided=divided)
        head_dim = width // heads if self.derives_head_dim else full.head_dim
        return heads, self._kv_heads(heads), head_dim

    def _check_heads(self, heads: int, *, width: int) -> None:
        model_type = self.config["model_type"]
        remedy = f"change {self.named('heads')} or {self.named('width')}."
        if self.derives_head_dim and (width % heads or width // heads % 2):
            raise ConfigError(
                f"{self.named('heads')} = {heads}: {model_type} takes hidden_size / heads as the size of a head, and "
                f"{width} / {heads} is not an even whole number; {remedy}"
            )
        if FAMILIES[model_type].divides_width and width % heads:
            raise ConfigError(
                f"{self.named('heads')} = {heads}: transformers refuses a {model_type} whose heads do not divide its "
                f"width, {width}; {remedy}"
            )

    def _kv_heads(self, heads: int) -> int:
        given = self.design.kv_heads
        if not FAMILIES[self.config["model_type"]].grouped:
            if given not in (None, heads):
                raise ConfigError(
                    f"{self.named('kv_heads')} = {given}: {self.config['model_type']} has a key head for each of its "
                    f"{heads} query heads; remove it."
                )
            return heads
        if given is None:
            return nearest_kv_heads(heads, full=self.full)
        if heads % given:
            raise ConfigError(
                f"{self.named('kv_heads')} = {given}: must divide the {heads} query heads; change it or "
                f"{self.named('heads')}."
            )
        return given


def full_sizes(config: Mapping[str, Any], *, shape: ModelShape, model: str) -> Sizes:
    """The sizes of the model itself. Errors: ConfigError when its heads are not whole groups."""
    if shape.heads % shape.kv_heads:
        raise ConfigError(
            f"{model}: its num_attention_heads = {shape.heads} is not a multiple of num_key_value_heads = "
            f"{shape.kv_heads}; correct its config.json."
        )
    mlp_width = config[FAMILIES[shape.model_type].expert_width_key]
    return Sizes(len(shape.layers), shape.width, shape.heads, shape.kv_heads, shape.head_dim, mlp_width)


def grid_step(size: int) -> int:
    """Sizes are multiples of this: 128 from 2,048 on, 64 from 512 on, below it the largest power of 2 in size / 8."""
    if size >= 2048:
        return 128
    return min(64, max(8, 1 << max(0, (size // 8).bit_length() - 1)))


def nearest_heads(ideal: float, *, full: Sizes, divided: int | None = None) -> tuple[int, int]:
    """(query heads, key heads): near `ideal` queries, and near the full model's number of queries to a key head.

    The second counts more, because a whole group is then kept or dropped. With one key head there is nothing to keep.
    `divided`: a width that the query heads must divide.
    """
    group = full.heads / full.kv_heads
    allowed = [heads for heads in range(1, full.heads + 1) if divided is None or divided % heads == 0]
    low, high = (1 - _HEAD_SLACK) * ideal, (1 + _HEAD_SLACK) * ideal
    closest = min(allowed, key=lambda heads: abs(math.log(heads / ideal)))
    counts = {closest, *(heads for heads in allowed if low <= heads <= high)}

    def cost(pair: tuple[int, int]) -> tuple[float, float]:
        heads, kv_heads = pair
        uneven = 0.0 if full.kv_heads == 1 else abs(math.log(heads / kv_heads / group))
        return round(abs(math.log(heads / ideal)) + _GROUP_WEIGHT * uneven, 9), uneven

    pairs = [(heads, nearest_kv_heads(heads, full=full)) for heads in sorted(counts)]
    return min(pairs, key=cost)


def nearest_kv_heads(heads: int, *, full: Sizes) -> int:
    """The divisor of `heads` whose number of queries to a key head is nearest to the full model's."""
    group = full.heads / full.kv_heads
    divisors = [count for count in range(1, min(heads, full.kv_heads) + 1) if heads % count == 0]
    return min(divisors, key=lambda count: (abs(math.log(heads / count / group)), count))


def _has_target(design: DesignConfig) -> bool:
    return any(value is not None for value in (design.ratio, design.parameters, design.memory_bytes, design.deploy))
