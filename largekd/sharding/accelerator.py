"""The accelerator of this process, seen through DeepSpeed's abstraction."""

import os
import sys
from pathlib import Path

import torch


def use_prebuilt_ops() -> None:
    """Point DeepSpeed at the helper ops that the set-up step built into this environment, if it did.

    Must run before the first import of deepspeed. A folder that the user named himself is left alone.
    """
    folder = Path(sys.prefix) / "torch_extensions"
    if folder.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))


def device() -> torch.device:
    """This rank's device."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return torch.device(accelerator.current_device_name())


def on_cpu() -> bool:
    """Whether the accelerator is the CPU itself."""
    return device().type == "cpu"


def peak_memory_bytes() -> int:
    """Most accelerator memory that this rank has allocated; 0 on the CPU, whose figure is the process's own."""
    from deepspeed.accelerator import get_accelerator

    return 0 if on_cpu() else int(get_accelerator().max_memory_allocated())
