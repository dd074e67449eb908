"""Learning-rate groups: the first pattern that finds a parameter's name claims it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from largekd.config.group_checks import DEFAULT_GROUP, NO_DECAY_SUFFIX
from largekd.config.train import GroupConfig, OptimConfig
from largekd.errors import ConfigError
from largekd.optim.depth import depth_factors
from largekd.sharding.shards import full_numel, full_shape

ALREADY_FROZEN = "(frozen)"
"""Name of the parameters that were frozen before the groups were made, such as the base of adapters."""

_SHOWN = 5

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their optimizer's settings; `lr_multiplier` 0: frozen, and without optimizer state."""

    name: str
    lr_multiplier: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    parameter_names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def is_frozen(self) -> bool:
        """Whether it does not learn."""
        return self.lr_multiplier == 0

    @property
    def numel(self) -> int:
        """Elements in the group, over all ranks."""
        return sum(full_numel(parameter) for parameter in self.parameters)


def build_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    config: OptimConfig,
    may_learn: Mapping[str, bool] | None = None,
) -> tuple[ParameterGroup, ...]:
    """Every parameter in exactly one group: those that learn, then the frozen ones. Multiplier 0 freezes.

    may_learn: where a schedule has frozen some for a while, what `requires_grad` was before; patterns are held against
    that, and a group whose parameters are all frozen at this moment is left out.

    Biases and norms (one-dimensional parameters) are not decayed, unless their group gives a decay of its own: they go
    to `<group>.no_decay`. With `layer_decay` a group is split by place too: `<group>.layer_3`, `<group>.embedding`.
    Errors: ConfigError as `check_claims`, and when nothing is left to train.
    """
    named = list(named_parameters)
    owners = check_claims(learning(named) if may_learn is None else may_learn, config=config)
    specs = {spec.name: spec for spec in (*config.groups, GroupConfig(name=DEFAULT_GROUP, pattern=""))}
    members: dict[str, Named] = {name: [] for name in specs}
    frozen: dict[str, Named] = {}
    for name, parameter in named:
        spec = specs[owners[name]]
        if spec.lr_multiplier == 0:
            parameter.requires_grad_(False)
            frozen.setdefault(spec.name, []).append((name, parameter))
        elif parameter.requires_grad:
            members[spec.name].append((name, parameter))
        else:
            frozen.setdefault(ALREADY_FROZEN, []).append((name, parameter))
    places = depth_factors((name for name, _ in named), decay=config.layer_decay)
    groups: list[ParameterGroup] = []
    for spec in specs.values():
        parts: dict[tuple[str, float], Named] = {}
        for name, parameter in members[spec.name]:
            parts.setdefault((places[name].place, places[name].factor), []).append((name, parameter))
        for (place, factor), chosen in parts.items():
            groups += _split(chosen, spec=spec, place=place, factor=factor, config=config)
    if not groups:
        raise ConfigError("optim.groups: every parameter is frozen (lr_multiplier 0); nothing is left to train.")
    still = GroupConfig(name=DEFAULT_GROUP, pattern="", lr_multiplier=0.0, weight_decay=0.0)
    return (*groups, *(_group(name, chosen, spec=still, factor=1.0, config=config) for name, chosen in frozen.items()))


def learning(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, bool]:
    """Each name, and whether its parameter learns."""
    return {name: parameter.requires_grad for name, parameter in named_parameters}


def check_claims(trainable: Mapping[str, bool], *, config: OptimConfig, more_later: bool = False) -> dict[str, str]:
    """Parameter name -> the group that claims it. `trainable`: each name, and whether its parameter may learn.

    more_later: other parameters will be added, so that a pattern may find its own among those.
    Errors: ConfigError for a pattern that claims nothing, or nothing that may learn; and with optim.strict for
    parameters that no group claims.
    """
    patterns = [(spec, re.compile(spec.pattern)) for spec in config.groups]
    owners = {
        name: next((spec.name for spec, pattern in patterns if pattern.search(name)), DEFAULT_GROUP)
        for name in trainable
    }
    if not more_later:
        for spec, pattern in patterns:
            _check_spec(spec, found=[name for name in trainable if pattern.search(name)], owners=owners, config=config)
            claimed = [name for name, owner in owners.items() if owner == spec.name]
            if spec.lr_multiplier and claimed and not any(trainable[name] for name in claimed):
                raise ConfigError(
                    f"optim.groups: the pattern {spec.pattern!r} of group {spec.name!r} claims parameters that are "
                    f"frozen, such as {claimed[0]!r}, and no other; correct or remove it."
                )
    left = [name for name, owner in owners.items() if owner == DEFAULT_GROUP and trainable[name]]
    if config.strict and left:
        raise ConfigError(
            f"optim.strict = true: {len(left)} parameters are claimed by no group of optim.groups, such as "
            f"{', '.join(left[:_SHOWN])}; add a pattern for them, or one that freezes them (lr_multiplier: 0)."
        )
    return owners


def _check_spec(spec: GroupConfig, *, found: Sequence[str], owners: Mapping[str, str], config: OptimConfig) -> None:
    """What was claimed for freezing does not count: freezing more layers must not make other groups an error."""
    freezing = {other.name for other in config.groups if other.lr_multiplier == 0}
    if found and all(owners[name] == spec.name or owners[name] in freezing for name in found):
        return
    if not any(owners[name] == spec.name for name in found):
        raise ConfigError(
            f"optim.groups: the pattern {spec.pattern!r} of group {spec.name!r} claims no parameter "
            "(none matches, or earlier groups claimed them all); correct or remove it."
        )


def _split(
    members: Named, *, spec: GroupConfig, place: str, factor: float, config: OptimConfig
) -> Iterator[ParameterGroup]:
    name = f"{spec.name}.{place}" if place else spec.name
    decayed = [(n, p) for n, p in members if spec.weight_decay is not None or len(full_shape(p)) > 1]
    others = [(n, p) for n, p in members if spec.weight_decay is None and len(full_shape(p)) <= 1]
    if decayed:
        yield _group(name, decayed, spec=spec, factor=factor, config=config)
    if others:
        plain = spec.model_copy(update={"weight_decay": 0.0})
        yield _group(name + NO_DECAY_SUFFIX, others, spec=plain, factor=factor, config=config)


def _group(name: str, members: Named, *, spec: GroupConfig, factor: float, config: OptimConfig) -> ParameterGroup:
    return ParameterGroup(
        name=name,
        lr_multiplier=spec.lr_multiplier * factor,
        weight_decay=config.weight_decay if spec.weight_decay is None else spec.weight_decay,
        betas=config.betas if spec.betas is None else spec.betas,
        eps=config.eps if spec.eps is None else spec.eps,
        parameter_names=tuple(n for n, _ in members),
        parameters=tuple(p for _, p in members),
    )
