"""The student on its way out: whole tensors one at a time, and the files that stand beside the weights."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from largekd.sharding.layout import Layout
from largekd.sharding.shards import gathered


def stream_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, under the name and in the parts that `save_pretrained` stores; tied ones under the first.

    Experts that the model holds as one tensor come one by one, as other engines and the hub want them.
    A collective call: all ranks walk it to the end. A tensor is valid until the next one is asked for.
    """
    layout = Layout(model)
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            yield from layout.stored(name, parameter.detach())
    persistent = persistent_buffers(model)
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield from layout.stored(name, buffer.detach())


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
