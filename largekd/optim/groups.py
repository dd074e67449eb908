"""Learning-rate groups: the first pattern that finds a parameter's name claims it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from largekd.config.train import OptimConfig
from largekd.errors import ConfigError
from largekd.sharding.shards import full_numel, full_shape

DEFAULT_GROUP = "default"
_NO_DECAY_SUFFIX = ".no_decay"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    lr_multiplier: float
    weight_decay: float
    parameter_names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def numel(self) -> int:
        """Elements in the group, over all ranks."""
        return sum(full_numel(parameter) for parameter in self.parameters)


def build_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, config: OptimConfig
) -> tuple[ParameterGroup, ...]:
    """Every trainable parameter in exactly one group, split by weight decay; multiplier 0 freezes and leaves it out.

    Biases and norms (one-dimensional parameters) are never decayed: they go to `<group>.no_decay`.
    Errors: ConfigError for a pattern that claims nothing, and when nothing is left to train.
    """
    claimed: dict[str, list[tuple[str, nn.Parameter]]] = {group.name: [] for group in config.groups}
    claimed[DEFAULT_GROUP] = []
    patterns = [(group.name, re.compile(group.pattern)) for group in config.groups]
    for name, parameter in named_parameters:
        owner = next((group for group, pattern in patterns if pattern.search(name)), DEFAULT_GROUP)
        claimed[owner].append((name, parameter))
    groups: list[ParameterGroup] = []
    for spec in config.groups:
        if not claimed[spec.name]:
            raise ConfigError(
                f"optim.groups: the pattern {spec.pattern!r} of group {spec.name!r} claims no parameter "
                "(none matches, or earlier groups claimed them all); correct or remove it."
            )
        if spec.lr_multiplier == 0:
            for _, parameter in claimed[spec.name]:
                parameter.requires_grad_(False)
            continue
        decay = config.weight_decay if spec.weight_decay is None else spec.weight_decay
        groups += _split(spec.name, claimed[spec.name], lr_multiplier=spec.lr_multiplier, weight_decay=decay)
    groups += _split(DEFAULT_GROUP, claimed[DEFAULT_GROUP], lr_multiplier=1.0, weight_decay=config.weight_decay)
    if not groups:
        raise ConfigError("optim.groups: every parameter is frozen (lr_multiplier 0); nothing is left to train.")
    return tuple(groups)


def describe_groups(groups: Iterable[ParameterGroup]) -> str:
    """A table of the groups for the log."""
    rows = [("group", "lr x", "decay", "tensors", "elements")]
    rows += [
        (g.name, f"{g.lr_multiplier:g}", f"{g.weight_decay:g}", str(len(g.parameters)), f"{g.numel:,}") for g in groups
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _split(
    name: str, members: list[tuple[str, nn.Parameter]], *, lr_multiplier: float, weight_decay: float
) -> list[ParameterGroup]:
    trainable = [(n, p) for n, p in members if p.requires_grad]
    parts = (
        (name, weight_decay, [(n, p) for n, p in trainable if len(full_shape(p)) > 1]),
        (name + _NO_DECAY_SUFFIX, 0.0, [(n, p) for n, p in trainable if len(full_shape(p)) <= 1]),
    )
    return [
        ParameterGroup(
            name=part,
            lr_multiplier=lr_multiplier,
            weight_decay=decay,
            parameter_names=tuple(n for n, _ in chosen),
            parameters=tuple(p for _, p in chosen),
        )
        for part, decay, chosen in parts
        if chosen
    ]
