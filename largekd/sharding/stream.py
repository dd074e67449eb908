"""Streaming a safetensors checkpoint into shards, one parameter at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from largekd.errors import ConfigError
from largekd.sharding.shards import full_shape, write_shard

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: names of parameters it filled, and tensors that the model has no place for."""

    loaded: tuple[str, ...]
    unused: tuple[str, ...]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file of a Hugging Face folder. Errors: ConfigError when it holds no safetensors weights."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: _inside(folder, file) for name, file in weight_map.items()}
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
    found = f"found only {', '.join(others)}, which are not read: they can carry code" if others else "found no weights"
    raise ConfigError(
        f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, {found}. "
        "Convert the weights to safetensors (GGUF: tools/convert_gguf.py) or change teacher.model / student.model."
    )


def load_parameters(module: nn.Module, *, folder: Path, rank: int, source_name: Callable[[str], str]) -> LoadReport:
    """Fill every parameter and persistent buffer of `module` from the checkpoint in `folder`.

    `source_name` maps the name of a parameter to that of its tensor.

    No more than one parameter's tensor is read at a time, and of that only this rank's part where the shard is in
    memory. Shared (tied) parameters are read once, under whichever of their names the checkpoint has.
    Errors: ConfigError naming the missing tensor, or the two shapes that differ.
    """
    files = tensor_files(folder)
    prefix = _prefix(files, module)
    used: set[str] = set()
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_opened(path)) for path in sorted(set(files.values()))}
        for key, aliases in names.items():
            candidates = [prefix(source_name(alias)) for alias in aliases]
            tensor_name = next((name for name in candidates if name in files), None)
            if tensor_name is None:
                raise _absent(candidates[0], folder=folder, files=files)
            value = opened[files[tensor_name]].get_tensor(tensor_name)
            if value.shape != full_shape(parameters[key]):
                raise ConfigError(
                    f"{folder}: tensor {tensor_name!r} has shape {tuple(value.shape)}, but the model needs "
                    f"{tuple(full_shape(parameters[key]))}; config.json and the weights do not belong together."
                )
            write_shard(parameters[key], value, rank=rank)
            used.update(candidates)
        for name, buffer in persistent_buffers(module):
            tensor_name = prefix(source_name(name))
            if tensor_name in files:
                with torch.no_grad():
                    buffer.copy_(opened[files[tensor_name]].get_tensor(tensor_name))
                used.add(tensor_name)
    return LoadReport(
        loaded=tuple(alias for aliases in names.values() for alias in aliases),
        unused=tuple(sorted(set(files) - used)),
    )


@contextmanager
def open_tensors(folder: Path, *, module: nn.Module) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one whole tensor of the checkpoint in `folder` by the name it has in `module`'s family.

    Errors: ConfigError when the folder holds no safetensors, or from the function when it lacks the tensor.
    """
    files = tensor_files(folder)
    prefix = _prefix(files, module)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_opened(path)) for path in sorted(set(files.values()))}

        def read(name: str) -> Tensor:
            stored = prefix(name)
            if stored not in files:
                raise _absent(stored, folder=folder, files=files)
            return opened[files[stored]].get_tensor(stored)

        yield read


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint, such as a router's correction bias."""
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _absent(name: str, *, folder: Path, files: Mapping[str, Path]) -> ConfigError:
    hint = ""
    if ".experts." in name and any(".experts.0." in other for other in files):
        hint = " Checkpoints with one tensor per expert are not read yet."
    return ConfigError(f"{folder}: no tensor {name!r}, which the model's config.json calls for.{hint}")


def _prefix(files: Mapping[str, Path], module: nn.Module) -> Callable[[str], str]:
    """How this checkpoint spells names: some were saved from the bare decoder, without its attribute's name."""
    base = getattr(module, "base_model_prefix", "")
    if base and not any(name.startswith(f"{base}.") for name in files):
        return lambda name: name.removeprefix(f"{base}.")
    return lambda name: name


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}. Fetch the file again.") from error


def _inside(folder: Path, file: str) -> Path:
    path = (folder / file).resolve()
    # Hub caches link every file to a blob outside the snapshot, so only the name itself can be held to the folder.
    if Path(file).name != file:
        raise ConfigError(f"{folder / INDEX_FILE}: weight_map names {file!r}, which is not a file name in this folder.")
    if not path.is_file():
        raise ConfigError(f"{folder}: {file} is listed in {INDEX_FILE} but missing. Fetch the model again.")
    return path
