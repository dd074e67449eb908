"""What a ds_configs file may say (placement), and who owns what it may not say.

Names and meanings are those of DeepSpeed 0.19 (`runtime/config.py`, `runtime/zero/config.py`).
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from largekd.config.common import Frozen

# Top-level keys that the run configuration owns, and the run key to set instead.
OWNERS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size, from which accumulation follows",
    "managed_gradient_accumulation": "train.global_batch_size, from which accumulation follows",
    "gradient_clipping": "train.gradient_clipping",
    "prescale_gradients": "train.global_batch_size: the step divides, once",
    "gradient_predivide_factor": "train.global_batch_size: the step divides, once",
    "gradient_allreduce_op": "train.global_batch_size: the step divides, once",
    "optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim.implementation",
    "zero_allow_untested_optimizer": "optim.implementation",
    "scheduler": "optim.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "seed": "train.seed",
    "steps_per_print": "log.every_steps",
    "wall_clock_breakdown": "log.every_steps",
    "tensorboard": "log.tensorboard",
    "wandb": "log.tensorboard",
    "csv_monitor": "log.every_steps",
    "comet": "log.tensorboard",
    "log_level": "log.level",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "checkpoint",
    "data_efficiency": "data",
    "dataloader_drop_last": "data",
    "sequence_parallel_size": "train.sequence_length",
}

# Keys that DeepSpeed itself deleted; a left-over one would be an error there, too.
REMOVED = {
    "amp": "use train.precision",
    "compression_training": "it has no successor",
    "curriculum_learning": "it has no successor here",
    "eigenvalue": "it has no successor",
    "elasticity": "the number of ranks is fixed at launch",
    "graph_harvesting": "it has no successor",
    "nebula": "use the checkpoint keys of the run configuration",
    "progressive_layer_drop": "it has no successor",
    "quantize_training": "it has no successor",
    "sparse_attention": "it has no successor",
    "sparse_gradients": "gradients of a sparse embedding need no key",
}
# Keys that DeepSpeed has and that cannot work with the versions this package is made for.
BROKEN = {
    "expert_parallel": "DeepSpeed 0.19.8 cannot read the mixture-of-experts models of transformers from 5.23 on; "
    "remove it: ZeRO-3 shards the experts like other weights and gathers those of a layer for its forward",
}
REMOVED_ZERO = {
    "mics_shard_size": "MiCS is gone; zero_hpz_partition_size shards weights within a node",
    "mics_hierarchical_params_gather": "MiCS is gone; zero_hpz_partition_size shards weights within a node",
    "zeropp_loco_param": "LoCo is gone; zero_quantized_gradients works without it",
    "cpu_offload": "use offload_optimizer",
    "cpu_offload_param": "use offload_param",
    "cpu_offload_use_pin_memory": "use pin_memory inside offload_param or offload_optimizer",
    "stage3_gather_fp16_weights_on_model_save": "the export gathers by itself",
    "stage3_gather_16bit_weights_on_model_save": "the export gathers by itself",
    "elastic_checkpoint": "ZeRO-3 has no elastic checkpoints",
}

Device = Literal["none", "cpu", "nvme"]


class _NvmeFolder(Frozen):
    device: Device = Field(description="Where the data lives between uses: none, cpu or nvme.")
    nvme_path: str | None = Field(None, description="Folder on a local disk, for nvme; ${NAME:-default} is expanded.")
    buffer_count: int | None = Field(None, ge=1, description="Host buffers for nvme.")
    pin_memory: bool = Field(True, description="Page-locked host memory; no use without a GPU.")

    @model_validator(mode="after")
    def _needs_folder(self) -> "_NvmeFolder":
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError('device "nvme" needs nvme_path, a folder on a local disk')
        return self


class OffloadParamConfig(_NvmeFolder):
    """Parameters outside the accelerator."""

    buffer_size: int = Field(100_000_000, ge=1, description="Elements in a buffer; the largest shard of a tensor fits.")
    max_in_cpu: int = Field(1_000_000_000, ge=0, description="Elements kept in host memory in front of nvme.")


class OffloadOptimizerConfig(_NvmeFolder):
    """Optimizer state outside the accelerator; its update runs on the CPU."""

    pipeline_read: bool = Field(False, description="Read the next tile during the update of this one.")
    pipeline_write: bool = Field(False, description="Write the last tile during the update of this one.")
    fast_init: bool = Field(False, description="Faster start with nvme.")
    ratio: float = Field(1.0, ge=0, le=1, description="Share of the state that is offloaded (cpu).")


class LeafModuleConfig(Frozen):
    """Modules that are gathered as one unit."""

    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    name_suffixes: tuple[str, ...] = ()


class ZeroConfig(Frozen):
    """`zero_optimization`: how ZeRO-3 shards, gathers and reduces."""

    stage: int
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(500_000_000, gt=0)
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(500_000_000, ge=0)
    overlap_comm: bool = True
    offload_param: OffloadParamConfig | None = None
    offload_optimizer: OffloadOptimizerConfig | None = None
    sub_group_size: int = Field(1_000_000_000, gt=0)
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0)
    stage3_model_persistence_threshold: int = Field(2**63 - 1, ge=0)
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0)
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0)
    stage3_module_granularity_threshold: int = Field(0, ge=0)
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    zero_hpz_partition_size: int = Field(1, ge=1)
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    round_robin_gradients: bool = False
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    leaf_module: LeafModuleConfig = Field(default_factory=LeafModuleConfig)

    @field_validator("stage")
    @classmethod
    def _stage_three(cls, value: int) -> int:
        if value != 3:
            raise ValueError("must be 3, the only ZeRO stage that shards the weights")
        return value


class AioConfig(Frozen):
    """`aio`: asynchronous reads and writes of NVMe offload."""

    block_size: int = Field(1_048_576, gt=0)
    queue_depth: int = Field(8, gt=0)
    intra_op_parallelism: int = Field(1, gt=0)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class PlacementConfig(Frozen):
    """A whole ds_configs file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    zero_optimization: ZeroConfig
    aio: AioConfig | None = None
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None


def forbidden(tree: Any) -> list[str]:
    """One line per key of a ds_configs file that is owned elsewhere, deleted by DeepSpeed, or left to "auto"."""
    if not isinstance(tree, dict):
        return ["must be a JSON object of DeepSpeed keys"]
    lines = [
        f"{key}: the run configuration owns this; remove it here and set {OWNERS[key]}" for key in tree if key in OWNERS
    ]
    lines += [f"{key}: DeepSpeed removed this key; {REMOVED[key]}" for key in tree if key in REMOVED]
    lines += [f"{key}: {BROKEN[key]}" for key in tree if key in BROKEN]
    zero = tree.get("zero_optimization")
    if isinstance(zero, dict):
        lines += [
            f"zero_optimization.{key}: no longer a key; {REMOVED_ZERO[key]}" for key in zero if key in REMOVED_ZERO
        ]
    lines += [f'{key} = "auto": nothing fills this in; write the value or leave the key out' for key in _autos(tree)]
    return lines


def _autos(tree: Any, *, prefix: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [
            found for key, value in tree.items() for found in _autos(value, prefix=f"{prefix}.{key}" if prefix else key)
        ]
    return [prefix] if tree == "auto" else []
