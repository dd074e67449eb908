"""Offload placements for tests, and the tests that need DeepSpeed's asynchronous I/O."""

from pathlib import Path
from typing import Any

import pytest

from largekd.runtime.build_lock import extensions_folder

needs_libaio = pytest.mark.skipif(
    not (extensions_folder() / "async_io").is_dir(), reason="the async_io op is not built: NVMe offload needs libaio"
)


def offload(device: str, *, folder: Path, param: bool = True, optimizer: bool = False) -> dict[str, Any]:
    """A ZeRO-3 placement with parameters (and the optimizer) on `device`."""
    target: dict[str, Any] = {"device": device, "pin_memory": False}
    if device == "nvme":
        target["nvme_path"] = str(folder)
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if param:
        # DeepSpeed's default holds 2 GB of buffers for every engine.
        buffers = {"buffer_count": 5, "buffer_size": 1_000_000} if device == "nvme" else {}
        zero["offload_param"] = target | buffers
    if optimizer:
        zero["offload_optimizer"] = target
    return {"zero_optimization": zero}
