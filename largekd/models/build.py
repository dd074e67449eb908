"""Building a causal language model in shards and filling it."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from largekd.errors import ConfigError
from largekd.planner.layer_lists import named_without_experts, without_experts
from largekd.sharding.shards import gathered, sharded_init
from largekd.sharding.stream import LoadReport, load_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(
    config: PretrainedConfig,
    *,
    ds_config: Mapping[str, Any],
    precision: str,
    attention: str,
    trust_remote_code: bool = False,
    key: str = "student",
) -> PreTrainedModel:
    """A model of this shape whose parameters are partitioned and undefined; fill it with one of the functions below.

    Errors: ConfigError when the family or this machine lacks the attention implementation (`<key>.attention`).
    """
    config = deepcopy(config)
    config.use_cache = False
    # The family's file is imported here: classes that are made inside sharded_init lose, when it ends, what a decorator
    # did to their __init__, and a second mixture of experts of the family could not run.
    MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    try:
        with sharded_init(ds_config):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPES[precision],
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{key}.attention = {attention!r}: transformers cannot build a {config.model_type!r} model with it "
            f"({str(error).splitlines()[0]})."
        ) from error
    # Tying is part of the initialisation that sharded_init skips.
    model.tie_weights()
    return model


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of this shape without weights: its names and shapes."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def load_pretrained(model: PreTrainedModel, *, folder: Path, rank: int) -> LoadReport:
    """Fill the model from its own checkpoint.

    Errors: ConfigError when a tensor is missing, has another shape, or has no place in the model: a configuration that
    ignores weights is another model.
    """
    report = load_parameters(model, folder=folder, rank=rank, source_name=lambda name: name)
    known = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    stray = [name for name in report.unused if not any(re.search(pattern, name) for pattern in known)]
    if stray:
        raise ConfigError(
            f"{folder}: {len(stray)} tensors have no place in the model of its config.json, such as {stray[0]!r}; "
            "config.json and the weights do not belong together."
        )
    return report


def load_layers(model: PreTrainedModel, *, folder: Path, rank: int, layers: Sequence[int]) -> LoadReport:
    """Fill the model from another checkpoint's layers: layer i of the model is layer `layers[i]` of the checkpoint."""
    return load_parameters(model, folder=folder, rank=rank, source_name=_layer_renamer(model, layers))


def config_with_layers(
    config: PretrainedConfig, *, layers: Sequence[int], key: str = "student.teacher_layers"
) -> PretrainedConfig:
    """The same model with only these layers, in this order.

    Errors: ConfigError for an index that does not exist; `key` named the layers.
    """
    depth = config.num_hidden_layers
    wrong = [index for index in layers if not 0 <= index < depth]
    if wrong or not layers:
        raise ConfigError(
            f"{key} = {list(layers)}: the model has layers 0 to {depth - 1}"
            + (f"; {wrong[0]} is not one of them." if wrong else "; name at least one.")
        )
    short = deepcopy(config)
    short.num_hidden_layers = len(layers)
    for name, value in config.to_dict().items():
        # What a family says of each layer (layer_types, no_rope_layers) goes along with the layer.
        if isinstance(value, list) and len(value) == depth:
            setattr(short, name, [value[index] for index in layers])
    if any(hasattr(config, name) for name in ("mlp_only_layers", "decoder_sparse_step")):
        is_dense = without_experts(config.to_dict())
        for name, value in named_without_experts([is_dense[index] for index in layers]).items():
            setattr(short, name, value)
    return short


def initialise_randomly(model: PreTrainedModel, *, seed: int, rank: int) -> None:
    """Draw the weights as the model family does; the same weights for one seed on any number of ranks.

    Module by module: one module's parameters are whole at a time. A collective call.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            with gathered(own, modifier_rank=0):
                if own and rank == 0:
                    _draw(model, module)


def _draw(model: PreTrainedModel, module: nn.Module) -> None:
    # Families with a custom initialisation cover every module kind; a norm's ones are among them.
    with torch.no_grad():
        model._init_weights(module)


def _layer_renamer(model: PreTrainedModel, layers: Sequence[int]) -> Callable[[str], str]:
    """Maps `….layers.<i>.…` of the student to `….layers.<layers[i]>.…` of the teacher."""
    path = layers_path(model)

    def rename(name: str) -> str:
        if not name.startswith(f"{path}."):
            return name
        index, rest = name[len(path) + 1 :].split(".", 1)
        return f"{path}.{layers[int(index)]}.{rest}"

    return rename


def layers_path(model: PreTrainedModel) -> str:
    """Dotted name of the list of decoder layers. Errors: ConfigError for a family that keeps them elsewhere."""
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and name.rsplit(".", 1)[-1] in {"layers", "h"}:
            return name
    raise ConfigError(
        f"{type(model).__name__} keeps its {depth} decoder layers where they were not found; "
        "use student.model or student.config instead of student.teacher_layers."
    )
