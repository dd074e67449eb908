"""A model folder with a trimmed vocabulary: rows of embedding and head chosen, everything else as it is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from largekd.errors import ConfigError
from largekd.runtime.files import write_json
from largekd.sharding.layout import Layout
from largekd.sharding.stream import INDEX_FILE, SINGLE_FILE, tensor_files


def trim_weights(source: Path, *, target: Path, config: PretrainedConfig, kept_V: NDArray[Any]) -> dict[str, list[int]]:
    """Write the weights of the folder `source` to `target` with the rows `kept_V` of embedding, head and its bias.

    File by file; the names of tensors and files stay. Returns the new shape of every tensor that was cut.
    Errors: ConfigError for a checkpoint without the embedding, and for one with too few rows.
    """
    files = tensor_files(source)
    embedding, head = vocabulary_tensors(config, files=files)
    for part, names in (("embedding", embedding), ("head", head)):
        if names is not None and not names:
            raise ConfigError(
                f"{source}: found no tensor of the vocabulary's {part} under a name that a {config.model_type!r} model "
                "has; fetch the model again, or save it with transformers' save_pretrained."
            )
    names = embedding | (head or frozenset())
    index, paths = torch.from_numpy(kept_V), sorted(set(files.values()))
    single, cut = len(paths) == 1, dict[str, list[int]]()
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name, file in files.items() if file == path}
        for name in names & tensors.keys():
            tensors[name] = _rows(tensors[name], name=name, index=index, folder=source)
            cut[name] = list(tensors[name].shape)
        save_file(tensors, target / (SINGLE_FILE if single else path.name), metadata={"format": "pt"})
    if not single:
        size = sum((target / path.name).stat().st_size for path in paths)
        weight_map = {name: path.name for name, path in files.items()}
        write_json(target / INDEX_FILE, value={"metadata": {"total_size": size}, "weight_map": weight_map})
    return cut


def vocabulary_tensors(
    config: PretrainedConfig, *, files: Iterable[str]
) -> tuple[frozenset[str], frozenset[str] | None]:
    """Which of the stored tensors `files` have the vocabulary as their first dimension: those of the embedding, and
    those of a head of its own with its bias (None: the head is the embedding), by the names that transformers reads,
    with and without the decoder's own prefix."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    prefix = f"{model.base_model_prefix}."
    stored = {name.removeprefix(prefix): found.parts for name, found in Layout(model).model_names(files).items()}

    def of(wanted: Iterable[Tensor]) -> frozenset[str]:
        ids = {id(parameter) for parameter in wanted}
        named = model.named_parameters(remove_duplicate=False)
        names = [name.removeprefix(prefix) for name, value in named if id(value) in ids]
        return frozenset(part for name in names for part in stored.get(name, ()))

    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert isinstance(embedding, Tensor)
    own = [] if head is None else [parameter for parameter in head.parameters() if parameter is not embedding]
    return of([embedding]), of(own) if own else None


def _rows(value: Tensor, *, name: str, index: Tensor, folder: Path) -> Tensor:
    if int(index.max()) >= value.shape[0]:
        raise ConfigError(
            f"{folder}: {name!r} has {value.shape[0]} rows, and the tokenizer has an id {int(index.max())}; "
            "the tokenizer and the weights do not belong together."
        )
    return value.index_select(0, index)
