"""Modules that ZeRO-3 must gather as one unit: mixtures whose experts are modules of their own.

Which experts run depends on the data, and differs between ranks; a rank that skips one would leave the others waiting
in its gathering. Families that keep a layer's experts in one fused weight need nothing.
"""

import logging

from torch import nn

logger = logging.getLogger(__name__)

_EXPERTS = "experts"
_LEAST_EXPERTS = 2


def leaf_modules(module: nn.Module, /) -> dict[str, nn.Module]:
    """The modules, by name, that hold a list of at least two equal experts chosen by data.

    Experts: equal children of a ModuleList that is called `experts`, or that stands beside a matrix with one row per
    child (the router). Decoder layers are equal too, but nothing beside them has their number of rows.
    """
    found: dict[str, nn.Module] = {}
    for name, owner in module.named_modules():
        if any(name == other or name.startswith(f"{other}.") for other in found):
            continue
        for child_name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and _is_experts(owner, name=child_name, experts=child):
                found[name] = owner
    return found


def mark_leaf_modules(module: nn.Module, /) -> tuple[str, ...]:
    """Let DeepSpeed gather those modules as one unit, and log them; before the engine is built. Returns their names."""
    from deepspeed.utils import set_z3_leaf_module

    found = leaf_modules(module)
    for owner in found.values():
        set_z3_leaf_module(owner, True)
    if found:
        logger.info("gathered as one unit, for experts that are chosen by data: %s", ", ".join(found))
    return tuple(found)


def _is_experts(owner: nn.Module, *, name: str, experts: nn.ModuleList) -> bool:
    if len(experts) < _LEAST_EXPERTS or len({_form(expert) for expert in experts}) != 1 or not _form(experts[0])[1]:
        return False
    return name == _EXPERTS or any(
        _has_row_per_expert(other, count=len(experts)) for other in owner.children() if other is not experts
    )


def _form(module: nn.Module) -> tuple[type, tuple[tuple[str, tuple[int, ...]], ...]]:
    """What equal modules have in common: class, and names and shapes of parameters."""
    return type(module), tuple((name, _whole_shape(parameter)) for name, parameter in module.named_parameters())


def _has_row_per_expert(module: nn.Module, *, count: int) -> bool:
    matrices = [_whole_shape(parameter) for parameter in module.parameters() if len(_whole_shape(parameter)) > 1]
    return len(matrices) == 1 and matrices[0][0] == count


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter that may be sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
