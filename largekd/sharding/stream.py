"""Streaming a safetensors checkpoint into shards, one parameter at a time."""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from largekd.errors import ConfigError
from largekd.sharding.layout import Layout
from largekd.sharding.pieces import Pieces
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


class StoredModel:
    """The tensors of a folder under the names that `module` gives them, with a stacked tensor where experts are stored
    one by one. A context manager; files are mapped, and only what is asked for is read.

    Errors: ConfigError for a folder without safetensors weights, or for tensors that cannot be stacked.
    """

    def __init__(self, folder: Path, *, module: nn.Module) -> None:
        self.folder = folder
        self._files = tensor_files(folder)
        self._names = Layout(module).model_names(self._files)
        self._base = getattr(module, "base_model_prefix", "")
        # Some folders were saved from the bare decoder, without its attribute's name.
        if any(name.startswith(f"{self._base}.") for name in self._names):
            self._base = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._opened = {path: stack.enter_context(_opened(path)) for path in sorted(set(self._files.values()))}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return self._spelt(name) in self._names

    def pieces(self, name: str) -> Pieces:
        """The tensor, not yet read. Errors: ConfigError when the folder has none of this name."""
        stored = self._names.get(self._spelt(name))
        if stored is None:
            raise ConfigError(
                f"{self.folder}: no tensor {self._spelt(name)!r}, which the model's config.json calls for."
            )
        shapes = [torch.Size(self._file(part).get_slice(part).get_shape()) for part in stored.parts]
        shape = shapes[0]
        if stored.experts is not None:
            if len(set(shapes)) > 1:
                raise ConfigError(f"{self.folder}: the experts of {name!r} have different shapes. Fetch it again.")
            shape = torch.Size((stored.experts, shape[0] * len(shapes) // stored.experts, *shape[1:]))
        return Pieces(
            shape=shape,
            reads=tuple(partial(self._read, part) for part in stored.parts),
            numels=tuple(shape.numel() for shape in shapes),
        )

    def read(self, name: str) -> Tensor:
        """The whole tensor. Errors: as `pieces`."""
        return self.pieces(name).whole()

    def without(self, used: Collection[str]) -> tuple[str, ...]:
        """The stored tensors of which none of the names in `used` is made."""
        wanted = {self._spelt(name) for name in used}
        return tuple(sorted(p for name, stored in self._names.items() if name not in wanted for p in stored.parts))

    def _spelt(self, name: str) -> str:
        return name.removeprefix(f"{self._base}.") if self._base else name

    def _file(self, part: str) -> safe_open:
        return self._opened[self._files[part]]

    def _read(self, part: str) -> Tensor:
        return self._file(part).get_tensor(part)


def load_parameters(module: nn.Module, *, folder: Path, rank: int, source_name: Callable[[str], str]) -> LoadReport:
    """Fill every parameter and persistent buffer of `module` from the checkpoint in `folder`.

    `source_name` maps the name of a parameter to that of its tensor.

    No more than one parameter's tensor is read at a time, and of that only this rank's part where the shard is in
    memory. Shared (tied) parameters are read once, under whichever of their names the checkpoint has.
    Errors: ConfigError naming the missing tensor, or the two shapes that differ.
    """
    used: set[str] = set()
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    with StoredModel(folder, module=module) as stored:
        for key, aliases in names.items():
            sources = [source_name(alias) for alias in aliases]
            source = next((source for source in sources if source in stored), sources[0])
            value = stored.pieces(source)
            if value.shape != full_shape(parameters[key]):
                raise ConfigError(
                    f"{folder}: tensor {source!r} has shape {tuple(value.shape)}, but the model needs "
                    f"{tuple(full_shape(parameters[key]))}; config.json and the weights do not belong together."
                )
            write_shard(parameters[key], value, rank=rank)
            used.update(sources)
        for name, buffer in persistent_buffers(module):
            if source_name(name) in stored:
                with torch.no_grad():
                    buffer.copy_(stored.read(source_name(name)))
                used.add(source_name(name))
        unused = stored.without(used)
    return LoadReport(
        loaded=tuple(alias for aliases in names.values() for alias in aliases),
        unused=unused,
    )


@contextmanager
def open_tensors(folder: Path, *, module: nn.Module) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one whole tensor of the checkpoint in `folder` by the name it has in `module`'s family.

    Errors: ConfigError when the folder holds no safetensors, or from the function when it lacks the tensor.
    """
    with StoredModel(folder, module=module) as stored:
        yield stored.read


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint, such as a router's correction bias."""
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


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
