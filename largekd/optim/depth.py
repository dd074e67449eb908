"""Layer-wise decay of the learning rate: the nearer to the input, the slower."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from largekd.errors import ConfigError

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(?P<index>\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|wpe|word_embeddings|tok_embeddings|embed_positions)\.")
# Projectors and predictors of alignment terms belong to no layer of the student.
_OUTSIDE = "alignment."


@dataclass(frozen=True)
class DepthFactor:
    """Where a parameter stands (`layer_3`, `embedding`; empty behind the layers), and its factor on the rate."""

    place: str
    factor: float


def depth_factors(names: Iterable[str], *, decay: float | None) -> Mapping[str, DepthFactor]:
    """Parameter name -> d^(L-1-i) in layer i of L, d^L in the embeddings, 1 elsewhere; all 1 without a decay.

    `names` are all of the student's, frozen ones among them, else L would be too small. A head that is tied to the
    embedding goes with it.
    Errors: ConfigError for a model whose layers or embeddings are not called as in the known families.
    """
    names = list(names)
    if decay is None:
        return dict.fromkeys(names, DepthFactor("", 1.0))
    layers = {name: int(found["index"]) for name in names if (found := _layer(name)) is not None}
    embeddings = {name for name in names if name not in layers and _EMBEDDING.search(name)}
    if not layers or not embeddings:
        missing = "layers" if not layers else "embeddings"
        raise ConfigError(
            f"optim.layer_decay = {decay:g}: the {missing} of this student were not found by their names, such as "
            f"{names[0] if names else 'none'!r}; remove the key and give optim.groups with factors of their own."
        )
    depth = max(layers.values()) + 1

    def factor(name: str) -> DepthFactor:
        if name in layers:
            return DepthFactor(f"layer_{layers[name]}", decay ** (depth - 1 - layers[name]))
        return DepthFactor("embedding", decay**depth) if name in embeddings else DepthFactor("", 1.0)

    return {name: factor(name) for name in names}


def _layer(name: str) -> re.Match[str] | None:
    return None if name.startswith(_OUTSIDE) else _LAYER.search(name)
