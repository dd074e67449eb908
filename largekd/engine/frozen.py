"""An engine that only evaluates: the frozen teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from largekd.engine.closing import close_engine
from largekd.engine.leaf_modules import mark_leaf_modules


class FrozenEngine:
    """A module whose sharded parameters are gathered module by module during its forward; it never learns."""

    def __init__(self, *, module: nn.Module, ds_config: Mapping[str, Any]) -> None:
        import deepspeed

        module.requires_grad_(False)
        module.eval()
        mark_leaf_modules(module)
        self._engine = deepspeed.initialize(model=module, config=dict(ds_config), dist_init_required=False)[0]
        self._engine.eval()

    def __call__(self, **inputs: Any) -> Any:
        """The module's output; no gradient is recorded."""
        with torch.no_grad():
            return self._engine(**inputs)

    def close(self) -> None:
        """Remove the hooks and free the buffers; the module stays, with its weights, to whoever holds it."""
        close_engine(self._engine)
