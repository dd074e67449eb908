"""Taking a DeepSpeed engine down so that nothing of it, nor of its module, stays."""

from typing import Any

from torch import nn


def close_engine(engine: Any, /) -> None:
    """Remove the engine's hooks and free its buffers; the module stays, with its weights, to whoever holds it.

    DeepSpeed's own `destroy` leaves the module on the stack of modules that are in their forward, and coordinators in
    caches of their class: weights of a model that is gone would stay until the process ends.
    """
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    # The engine's own hooks on its module, which `destroy` leaves there.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    module, optimizer = engine.module, engine.optimizer
    # An engine that only evaluates has no optimizer; DeepSpeed puts the offload in its place.
    offload = getattr(optimizer, "parameter_offload", optimizer)
    coordinator = offload.get_param_coordinator()
    # Every engine lays its module there when it is made.
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    for member in vars(type(coordinator)).values():
        _clear_cache(member)
    # References from autograd's side outlive the engine; what they keep is made empty.
    for left in (coordinator, offload, optimizer, engine):
        left.__dict__.clear()
    nn.Module.__init__(engine)


def _clear_cache(member: Any) -> None:
    """Empty the `lru_cache` of a method that DeepSpeed has wrapped in another function."""
    for cell in getattr(member, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
