"""Seeding, and every global random generator's state in files without pickle."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from largekd.errors import CheckpointError
from largekd.runtime.files import read_json, write_json


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and every accelerator with the same number on all ranks."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_random_state(folder: Path, *, rank: int) -> None:
    """Write this rank's generators: `rank_00000.safetensors` (integer states) and `rank_00000.json` (the rest).

    Covered: Python's `random`, NumPy's global generator, torch's CPU generator, the current accelerator's.
    """
    python_version, python_words, python_gauss = random.getstate()
    kind, numpy_words, numpy_position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    device = _accelerator()
    tensors: dict[str, Tensor] = {
        "python": torch.tensor(python_words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(numpy_words).astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if device is not None:
        tensors["accelerator"] = torch.get_device_module(device).get_rng_state().cpu()
    save_file(tensors, _tensors_path(folder, rank=rank))
    rest = {
        "python": {"version": python_version, "gauss": python_gauss},
        "numpy": {"kind": kind, "position": numpy_position, "has_gauss": has_gauss, "gauss": numpy_gauss},
        "accelerator": device.type if device is not None else None,
    }
    write_json(_rest_path(folder, rank=rank), value=rest)


def load_random_state(folder: Path, *, rank: int) -> None:
    """Set this rank's generators to what `save_random_state` wrote.

    Raises CheckpointError when a file is absent or unreadable, or was written on another kind of accelerator.
    """
    path = _rest_path(folder, rank=rank)
    try:
        rest = read_json(path)
        tensors = load_file(_tensors_path(folder, rank=rank))
        _restore(rest, tensors=tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.with_suffix('')}.*: no usable random state for rank {rank} ({type(error).__name__}: {error}); "
            "a run resumes with the number of ranks and the kind of accelerator that it was saved with"
        ) from error


def _restore(rest: dict[str, Any], *, tensors: dict[str, Tensor]) -> None:
    device = _accelerator()
    kind = device.type if device is not None else None
    if rest["accelerator"] != kind:
        raise ValueError(f"saved on accelerator {rest['accelerator']}, this process has {kind}")
    python, numpy_rest = rest["python"], rest["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    words = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy_rest["kind"], words, numpy_rest["position"], numpy_rest["has_gauss"], numpy_rest["gauss"])
    )
    torch.set_rng_state(tensors["torch"])
    if device is not None:
        torch.get_device_module(device).set_rng_state(tensors["accelerator"])


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _tensors_path(folder: Path, *, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.safetensors"


def _rest_path(folder: Path, *, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"
