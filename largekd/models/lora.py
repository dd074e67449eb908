"""Low-rank adapters of the `peft` library on a frozen, sharded model; and the same model with them merged.

An adapted layer is W x + s B A x with s = alpha / rank (LoRA, arXiv 2106.09685), or with DoRA (arXiv 2402.09353)
m ∘ (W + s B A) x / ‖W + s B A‖, the norm taken over each output's row.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from largekd.config.lora import LoraConfig
from largekd.errors import ConfigError
from largekd.models.build import layers_path
from largekd.sharding.shards import full_shape, gathered, register_external, shard_parameters

ADAPTER = "default"
"""The adapter's name inside of peft's modules."""

ADAPTER_FILE = "adapter_model.safetensors"
_BASE = "base_layer"
_PEFT_PREFIX = "base_model.model."
_MAGNITUDE = "lora_magnitude_vector"


def require_peft() -> None:
    """Errors: ConfigError when the library is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("student.lora: needs the package peft; install it with `pip install 'largekd[lora]'`.")


def lora_targets(model: PreTrainedModel, *, config: LoraConfig) -> dict[int, tuple[str, ...]]:
    """Decoder layer -> names inside of it of the linear layers that get an adapter. Takes a model without weights too.

    Errors: ConfigError for a pattern that finds no linear layer, and for a rank beyond a layer's width.
    """
    pattern, path = re.compile(config.pattern), layers_path(model)
    found: dict[int, tuple[str, ...]] = {}
    examples: list[str] = []
    for index, layer in enumerate(_layers(model)):
        linears = {f"{path}.{index}.{name}": name for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        examples = examples or list(linears)
        chosen = {whole: name for whole, name in linears.items() if pattern.search(whole)}
        for whole, name in chosen.items():
            narrower = min(full_shape(layer.get_submodule(name).weight))
            if config.rank > narrower:
                raise ConfigError(
                    f"student.lora.rank = {config.rank}: {whole} is {narrower} wide on its narrower side, which is the "
                    "largest rank of a map beside it; lower it."
                )
        if chosen:
            found[index] = tuple(chosen.values())
    if not found:
        raise ConfigError(
            f"student.lora.pattern = {config.pattern!r}: finds no linear layer of the decoder; they are called "
            f"{', '.join(examples) or 'nothing, for there are none'}."
        )
    return found


def parameter_names(model: PreTrainedModel, *, config: LoraConfig | None) -> dict[str, bool]:
    """The names of the parameters as users know them, and whether each learns; also before there are adapters."""
    if config is None:
        return {name: True for name, _ in model.named_parameters()}
    names = {name: False for name, _ in model.named_parameters()}
    path = layers_path(model)
    kinds = ("lora_A", "lora_B", *([_MAGNITUDE] if config.dora else []))
    for index, targets in lora_targets(model, config=config).items():
        names |= {f"{path}.{index}.{target}.{kind}.{ADAPTER}.weight": True for target in targets for kind in kinds}
    return names


def add_lora(model: PreTrainedModel, *, config: LoraConfig, ds_config: Mapping[str, Any], seed: int) -> None:
    """Freeze `model` and give it adapters, the same on any number of ranks; the function does not change at first.

    Layer by layer: one layer's adapters, and with DoRA its weights, are whole at a time; then they are sharded.
    A collective call. Errors: ConfigError as `lora_targets`, and without the library.
    """
    require_peft()
    from peft import inject_adapter_in_model

    targets = lora_targets(model, config=config)
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for index, names in targets.items():
            layer = _layers(model)[index]
            bases = [p for name in names for p in layer.get_submodule(name).parameters()] if config.dora else []
            with gathered(bases):
                inject_adapter_in_model(_peft_config(config, targets=names), layer, adapter_name=ADAPTER)
            shard_parameters(layer, ds_config=ds_config)
    for _, linear in lora_layers(model):
        for magnitude in getattr(linear, _MAGNITUDE).values():
            # DoRA reads the frozen layer's parameters and A's shape, outside of those layers' own forwards.
            for parameter in (*linear.base_layer.parameters(), linear.lora_A[ADAPTER].weight):
                register_external(magnitude, parameter)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers with their names; none without adapters."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, _BASE):
            yield name, module


@contextmanager
def base_alone(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model is its frozen base, without dropout. Only for forwards without gradients.

    What activation checkpointing runs again in a backward pass never falls inside of such a block.
    """
    assert not torch.is_grad_enabled(), "a recomputation of this forward would have the adapters"
    layers = [layer for _, layer in lora_layers(model)]
    was_training = model.training
    try:
        model.eval()
        for layer in layers:
            # peft's own switch would also change requires_grad, which a live engine must not see.
            layer._disable_adapters = True
            assert layer.disable_adapters
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(was_training)


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters; those of adapters stay as they are."""
    return name.replace(f".{_BASE}.", ".")


def plain_names(model: nn.Module) -> list[str]:
    """The names of the parameters of the model without adapters."""
    own = _adapter_parameters(model)
    return [plain_name(name) for name, parameter in model.named_parameters() if id(parameter) not in own]


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, whole, adapters merged into the weights (float32), under its Hugging Face name.

    Tied ones come under the first name. A collective call: all ranks walk it to the end. A tensor is valid until the
    next one is asked for.
    """
    own = _adapter_parameters(model)
    adapted = {id(layer.base_layer.weight): layer for _, layer in lora_layers(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            continue
        layer = adapted.get(id(parameter))
        adapter = [] if layer is None else [p for p in layer.parameters() if id(p) in own]
        with gathered([parameter, *adapter]):
            yield plain_name(name), parameter.detach() if layer is None else merged_weight(layer)


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """(O, I) W + s B A, with DoRA each row brought to its length m; float32. The parameters must be whole."""
    weight_OI: Tensor = layer.base_layer.weight.float()
    a_RI, b_OR = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    weight_OI = weight_OI + layer.scaling[ADAPTER] * (b_OR @ a_RI)
    magnitudes = getattr(layer, _MAGNITUDE)
    if ADAPTER in magnitudes:
        length_O = torch.linalg.norm(weight_OI, dim=1)
        weight_OI = weight_OI * (magnitudes[ADAPTER].weight.float() / length_O)[:, None]
    return weight_OI


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters' own tensors, whole, under the names of a peft folder. As `whole_parameters`."""
    own = _adapter_parameters(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            stored = name.replace(f".{ADAPTER}.", ".")
            if _MAGNITUDE in name:
                stored = stored.removesuffix(".weight")
            with gathered([parameter]):
                yield _PEFT_PREFIX + stored, parameter.detach()


def save_adapter(
    folder: Path, *, model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor], base: str
) -> None:
    """Write a folder that peft's PeftModel.from_pretrained loads onto the model `base`. Errors: OSError."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(dict(tensors), folder / ADAPTER_FILE, metadata={"format": "pt"})
    whole = _peft_config(config, targets=[name for name, _ in lora_layers(model)])
    whole.task_type, whole.base_model_name_or_path, whole.inference_mode = "CAUSAL_LM", base, True
    whole.save_pretrained(str(folder))


def _peft_config(config: LoraConfig, *, targets: Sequence[str]) -> Any:
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=config.rank,
        # peft's annotation says int; it only divides by the rank.
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_dora=config.dora,
        bias="none",
        target_modules=list(targets),
    )


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that adapters added."""
    return {
        id(parameter)
        for _, layer in lora_layers(model)
        for name, parameter in layer.named_parameters()
        if not name.startswith(f"{_BASE}.")
    }


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers
