"""The student on its way out: whole tensors one at a time, and the files that stand beside the weights."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from largekd.models.build import layers_path
from largekd.models.lora import whole_parameters
from largekd.sharding.layout import Layout


def stream_tensors(model: PreTrainedModel, *, layers: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, adapters merged, under the name and in the parts that `save_pretrained` stores.

    Tied ones come under the first name. Experts that the model holds as one tensor come one by one, as other engines
    and the hub want them.
    layers: of the decoder's layers only these, numbered anew; None: all.
    A collective call: all ranks walk it to the end. A tensor is valid until the next one is asked for.
    """
    renamed, layout = _renamer(model, layers=layers), Layout(model)
    for name, whole in whole_parameters(model):
        if (kept := renamed(name)) is not None:
            yield from layout.stored(kept, whole)
    persistent = persistent_buffers(model)
    for name, buffer in model.named_buffers():
        if name in persistent and (kept := renamed(name)) is not None:
            yield from layout.stored(kept, buffer.detach())


def _renamer(model: PreTrainedModel, *, layers: Sequence[int] | None) -> Callable[[str], str | None]:
    """The name that a tensor has in a model of these layers alone; None for one of another layer."""
    if layers is None:
        return lambda name: name
    prefix = f"{layers_path(model)}."
    place = {str(old): new for new, old in enumerate(layers)}

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return name
        index, rest = name.removeprefix(prefix).split(".", 1)
        return f"{prefix}{place[index]}.{rest}" if index in place else None

    return rename


def save_extras(
    folder: Path,
    *,
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    model_config: PretrainedConfig | None = None,
) -> None:
    """Write config.json, the tokenizer with its chat template, and the generation settings of `source`, if any.

    model_config: of what is exported, where that is less than `model`.
    """
    config = model.config.__class__.from_dict((model_config or model.config).to_dict())
    config.dtype = dtype
    config.use_cache = True
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def persistent_buffers(model: PreTrainedModel) -> frozenset[str]:
    """Names of the buffers that belong to a checkpoint."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return frozenset(model.state_dict().keys()) - parameters
