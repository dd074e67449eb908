"""The learning-rate groups of a run: checked before weights are read, shown, and noted in the run folder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from largekd.config.placement import Placements, offload_device
from largekd.config.run import RunConfig
from largekd.distillation.phases import Phase
from largekd.errors import ConfigError
from largekd.models.build import layers_path
from largekd.models.frozen_layers import check_freezable, freeze_layers
from largekd.models.lora import parameter_names, require_peft
from largekd.optim.depth import depth_factors
from largekd.optim.groups import ParameterGroup, check_claims
from largekd.optim.table import describe_groups, group_differences, group_records
from largekd.runtime.files import read_json, write_json
from largekd.runtime.ranks import Ranks, Together

logger = logging.getLogger(__name__)

GROUPS_FILE = "groups.json"

_MOMENT_BYTES = 8
_MASTER_BYTES = 4


def check_parameters(config: RunConfig, *, model_config: PretrainedConfig) -> None:
    """Hold the patterns of groups and adapters against the student's parameter names, before any weight is read.

    A student whose names are its own affair (teacher.kind 'self_shared') is checked when it is built.
    Errors: ConfigError names the pattern.
    """
    optim, lora = config.optim, config.student.lora
    if lora is not None:
        require_peft()
    if config.teacher.kind == "self_shared" or not (optim.groups or optim.layer_decay is not None or lora is not None):
        return
    names = parameter_names(_without_weights(config, model_config=model_config), config=lora)
    aligned = bool(config.objective.features or config.objective.attention)
    check_claims(names, config=optim, more_later=aligned)
    depth_factors(names, decay=optim.layer_decay)


def check_phases(phases: Sequence[Phase], *, model_config: PretrainedConfig) -> None:
    """Hold what freezing, groups and adapters leave of the student against every phase, before any weight is read.

    Errors: ConfigError for a phase in which nothing of the student would learn.
    """
    for phase in phases:
        frozen, config = phase.frozen, phase.config
        if frozen is None:
            continue
        model = _without_weights(config, model_config=model_config)
        names = parameter_names(model, config=config.student.lora)
        owners = check_claims(names, config=config.optim, more_later=True)
        still = {group.name for group in config.optim.groups if group.lr_multiplier == 0}
        freeze_layers(model, frozen=frozen)
        path = layers_path(model)
        layers = tuple(f"{path}.{index}." for index in frozen.layers)
        held = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        if not any(
            learns and owners[name] not in still and name not in held and not name.startswith(layers)
            for name, learns in names.items()
        ):
            raise ConfigError(
                f"freezing: nothing of the student would learn in {phase.name} ({frozen}), because the rest is frozen "
                "by optim.groups or has no adapter of student.lora; change freezing.parts, freezing.order or those."
            )


def check_offload(config: RunConfig, *, placements: Placements) -> None:
    """Refuse frozen weights on NVMe: from the second pass on DeepSpeed reads ahead, and fails on them. Errors:
    ConfigError names the key that freezes."""
    if offload_device(placements.student, "offload_param") != "nvme":
        return
    frozen = [f"optim.groups.{index}" for index, group in enumerate(config.optim.groups) if group.lr_multiplier == 0]
    frozen += ["student.lora"] if config.student.lora is not None else []
    frozen += ["teacher.kind = 'self_shared'"] if config.teacher.kind == "self_shared" else []
    if frozen:
        raise ConfigError(
            f"{frozen[0]}: freezes weights of the student, which student.deepspeed = {config.student.deepspeed!r} "
            "keeps on NVMe, where DeepSpeed cannot train beside frozen ones; set its offload_param.device to cpu."
        )


def note_groups(
    groups: Sequence[ParameterGroup], *, config: RunConfig, folder: Path, ranks: Ranks, phase: int, first: bool
) -> None:
    """Show the groups of a phase and note them in groups.json; `first`: nothing of this run was done before.

    A collective call. Errors: ConfigError when a run that goes on had other groups in this phase, naming what differs.
    """
    state_bytes = _MOMENT_BYTES + (_MASTER_BYTES if config.train.precision != "fp32" else 0)
    with Together():
        if not ranks.is_main:
            return
        records, path = group_records(groups, state_bytes=state_bytes), folder / GROUPS_FILE
        noted: dict[str, Any] = {} if first or not path.is_file() else read_json(path)
        if str(phase) in noted:
            differences = group_differences(noted[str(phase)], records)
            if differences:
                listed = "\n  ".join(differences)
                raise ConfigError(
                    f"{path}: this run began with other learning-rate groups:\n  {listed}\n"
                    "Restore them, choose another run.dir, or run.fresh=true to move that run aside."
                )
        write_json(path, value={**noted, str(phase): records})
        logger.info("learning-rate groups:\n%s", describe_groups(groups, state_bytes=state_bytes))


def check_frozen(config: RunConfig, *, model_config: PretrainedConfig) -> None:
    """Errors: ConfigError for `freezing` of a student whose layers cannot be told apart, before any weight is read."""
    if config.freezing is not None:
        check_freezable(_without_weights(config, model_config=model_config), key="freezing")


def _without_weights(config: RunConfig, *, model_config: PretrainedConfig) -> PreTrainedModel:
    with no_init_weights(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.student.trust_remote_code
        )
    model.tie_weights()
    return model
