"""What weights take with them from one engine to the next: master copies, moments, and how long they have learnt.

On each rank's own shards, in host memory, by parameter name; nothing is gathered.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from largekd.optim.groups import ParameterGroup
from largekd.sharding.master import drop_whole_copy, master_shard, own_shard
from largekd.sharding.shards import full_shape, is_sharded

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LEFT_ON_MODULES = ("pre_bwd_fn", "post_bwd_fn")
Named = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Carried:
    """One parameter's shards: `master` in float32, AdamW's `moments` after `updates` of them (none before the first).

    A parameter that was frozen has its shard as it is in the model, and no moments.
    """

    shape: torch.Size
    master: Tensor
    moments: Mapping[str, Tensor]
    updates: int = 0


def take(named: Named, *, moments: bool) -> dict[str, Carried]:
    """This rank's part of every parameter, while its engine still lives; the moments only where they are asked for."""
    taken = {}
    for name, parameter in named:
        master = master_shard(parameter).detach().cpu().clone()
        entry = Carried(shape=full_shape(parameter), master=master, moments={})
        if moments and parameter.requires_grad:
            entry = _with_moments(entry, parameter=parameter)
        taken[name] = entry
    return taken


def restore_shards(named: Named, *, carried: Mapping[str, Carried]) -> None:
    """Write the weights into modules that were built anew, by name and shape, before there is an engine."""
    for name, parameter in named:
        entry = _fitting(name, parameter, carried=carried)
        if entry is None:
            continue
        with torch.no_grad():
            own_shard(parameter).copy_(entry.master)
        drop_whole_copy(parameter)


def restore_optimizer(named: Named, *, carried: Mapping[str, Carried]) -> None:
    """Write master copies and moments into the optimizer of a new engine, whose groups `by_updates` has split."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    for name, parameter in named:
        entry = _fitting(name, parameter, carried=carried)
        if entry is None or not parameter.requires_grad:
            continue
        safe_set_local_fp32_param(parameter, entry.master)
        if not entry.moments:
            continue
        _make_state(parameter, updates=entry.updates)
        for key, value in entry.moments.items():
            safe_set_local_optimizer_state(parameter, value, key)


def by_updates(groups: Sequence[ParameterGroup], *, updates: Mapping[str, int]) -> tuple[ParameterGroup, ...]:
    """The groups, split where their parameters have had unequal numbers of updates: AdamW counts once for a group.

    The part with the most updates keeps the group's name; others are called `<group>.after_<updates>`.
    """
    split: list[ParameterGroup] = []
    for group in groups:
        counts = sorted({updates.get(name, 0) for name in group.parameter_names}, reverse=True)
        for count in counts:
            chosen = [
                (name, parameter)
                for name, parameter in zip(group.parameter_names, group.parameters, strict=True)
                if updates.get(name, 0) == count
            ]
            split.append(
                replace(
                    group,
                    name=group.name if count == counts[0] else f"{group.name}.after_{count}",
                    parameter_names=tuple(name for name, _ in chosen),
                    parameters=tuple(parameter for _, parameter in chosen),
                )
            )
    return tuple(split)


def updates_of(named: Named, *, carried: Mapping[str, Carried]) -> dict[str, int]:
    """How often each parameter that learns and inherits moments was updated; the others are left out."""
    updates = {}
    for name, parameter in named:
        entry = _fitting(name, parameter, carried=carried)
        if entry is not None and entry.moments and parameter.requires_grad:
            updates[name] = entry.updates
    return updates


def frozen_digest(named: Named) -> str:
    """SHA-256 over this rank's shards of the parameters that do not learn."""
    digest = hashlib.sha256()
    for name, parameter in named:
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(own_shard(parameter).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def release(module: nn.Module) -> None:
    """Let go of a closed engine: DeepSpeed leaves references to it on every parameter and module.

    Those on modules are worse than a leak: the next engine takes what it finds there for its own, and the backward pass
    would then run on the old engine's record of what to fetch.
    """
    for inner in module.modules():
        for name in _LEFT_ON_MODULES:
            inner.__dict__.pop(name, None)
    for parameter in module.parameters():
        parameter.grad = None
        parameter.__dict__.pop("_z3_optimizer", None)


def _with_moments(entry: Carried, *, parameter: Any) -> Carried:
    from deepspeed.utils import safe_get_local_optimizer_state

    state = _state_of(parameter)
    if not state:
        return entry
    moments = {key: safe_get_local_optimizer_state(parameter, key).detach().cpu().clone() for key in _MOMENTS}
    return replace(entry, moments=moments, updates=int(state["step"]))


def _fitting(name: str, parameter: nn.Parameter, *, carried: Mapping[str, Carried]) -> Carried | None:
    entry = carried.get(name)
    fits = entry is not None and is_sharded(parameter) and entry.shape == full_shape(parameter)
    return entry if fits else None


def _partition(parameter: Any) -> Tensor:
    """The optimizer's flat float32 tensor that this parameter is a part of."""
    owner = parameter._z3_optimizer
    group, _, _ = owner.grad_position[owner.get_param_id(parameter)]
    flat: Tensor = owner.fp32_partitioned_groups_flat[group]
    return flat


def _state_of(parameter: Any) -> dict[str, Any]:
    found: dict[str, Any] = parameter._z3_optimizer.optimizer.state.get(_partition(parameter), {})
    return found


def _make_state(parameter: Any, *, updates: int) -> None:
    """AdamW's state as it is after `updates` steps, with moments to be filled in; torch makes it at the first step."""
    flat = _partition(parameter)
    state = parameter._z3_optimizer.optimizer.state[flat]
    if not state:
        state["step"] = torch.tensor(float(updates), dtype=torch.float32, device=flat.device)
        for key in _MOMENTS:
            state[key] = torch.zeros_like(flat)
    assert int(state["step"]) == updates, "a group holds parameters of one count alone"
