"""The builder: the only file that knows every room."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from largekd.config.checks import check_world
from largekd.config.divergence import TopKSignalConfig
from largekd.config.placement import Placements, offload_device, read_placements
from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.data.loader import RowLoader
from largekd.distillation.backbone import BackboneModel
from largekd.distillation.cache_binding import check_teacher_data, stored_layers
from largekd.distillation.calibrate import calibrate
from largekd.distillation.data import RunData, build_data
from largekd.distillation.expert_loads import loads_of
from largekd.distillation.groups import check_parameters, note_groups
from largekd.distillation.initialise import write_report
from largekd.distillation.layer_drop import LayerDrop, build_layer_drop, reduced_depths
from largekd.distillation.layers import check_deep_layers, decoder_shape, find_pairs
from largekd.distillation.model import DistillModel
from largekd.distillation.models import Sources, build_student, find_sources
from largekd.distillation.numerics import GradientWatch
from largekd.distillation.remote import Surroundings
from largekd.distillation.rollouts import build_rollouts
from largekd.distillation.router import build_router
from largekd.distillation.self_shared import (
    SelfSharedModel,
    check_shared,
    serve_shared,
    share_backbone,
    shared_objective,
)
from largekd.distillation.teachers import build_teacher_model, serve_teacher, teacher_ds_configs
from largekd.engine.ds_config import train_ds_config
from largekd.engine.train import TrainEngine
from largekd.generation.rollouts import Rollouts
from largekd.models.decoder import Decoder
from largekd.objectives.alignment import Alignment, AlignmentPlan
from largekd.objectives.layer_maps import LayerPair
from largekd.objectives.plugins import load_plugins
from largekd.objectives.router import RouterTerms
from largekd.objectives.router_loads import RouterLoads
from largekd.objectives.selection import TokenSelection
from largekd.objectives.terms import Objective, build_objective
from largekd.objectives.vocabulary import VocabularyPass
from largekd.optim.groups import build_groups
from largekd.runtime.files import write_json
from largekd.runtime.ranks import MainFirst, Ranks, Together
from largekd.sharding.accelerator import device
from largekd.sharding.shards import sharded_modules
from largekd.teachers.cache_taps import StoredLayers
from largekd.teachers.protocol import Teacher


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, ready for its first step."""

    config: RunConfig
    ranks: Ranks
    device: torch.device
    sources: Sources
    student: Decoder
    engine: TrainEngine
    teacher: Teacher
    objective: Objective
    alignment: Alignment | None
    selection: TokenSelection | None
    watch: GradientWatch
    loader: RowLoader
    evaluation_batches: Callable[[], Iterator[Batch]] | None
    resumable: bool
    accumulation: int
    rollouts: Rollouts | None = None
    layer_drop: LayerDrop | None = None
    depths: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    router: RouterTerms | None = None
    router_loads: RouterLoads | None = None

    def close(self) -> None:
        """Take both engines down."""
        self.teacher.close()
        self.engine.close()


def build(
    config: RunConfig,
    *,
    ranks: Ranks,
    folder: Path,
    control: dist.ProcessGroup | None = None,
    resumed: bool = False,
    around: Surroundings | None = None,
) -> Parts:
    """Build a run's parts, cheapest checks first. A collective call; `control` is for agreements that may take long.

    resumed: a checkpoint will be loaded into the parts. around: what a teacher that may wait takes from the run.

    Errors: any LargeKDError; the message names the key to change.
    """
    accumulation = check_world(config, world_size=ranks.world_size)
    placements = read_placements(config)
    objective = build_objective(config.objective, plugins=load_plugins(config.plugins), rollouts=config.rollouts)

    def first() -> MainFirst:
        return MainFirst(ranks=ranks, group=control)

    sources = find_sources(config, first=first)
    check_parameters(config, model_config=sources.student_config)
    if config.teacher.kind == "self_shared":
        check_shared(config, model_config=sources.student_config)
        objective = shared_objective(objective)
    data = build_data(config, sources=sources, ranks=ranks, folder=folder, first=first)
    check_teacher_data(config, sources=sources, samples=data.samples)

    trained = train_ds_config(
        placements.student,
        train=config.train,
        optim=config.optim,
        accumulation=accumulation,
        world_size=ranks.world_size,
    )
    models = _build_models(
        config,
        objective=objective,
        sources=sources,
        data=data,
        placements=placements,
        trained=trained,
        ranks=ranks,
        folder=folder,
        resumed=resumed,
        around=around,
    )
    rollouts = build_rollouts(
        config,
        samples=data.samples["train"],
        sources=sources,
        student=models.student,
        teacher_decoder=models.teacher_decoder,
        teacher=models.teacher,
        ranks=ranks,
    )
    with Together():
        if ranks.is_main:
            write_json(folder / "deepspeed.json", value={**models.teacher_ds_configs, "student": trained})
    chosen = config.objective.selection
    selection = None if chosen is None else TokenSelection(chosen, device=device())
    module = build_distill_model(
        objective,
        student=models.student,
        alignment=models.alignment,
        selection=selection,
        kind=models.kind,
        router=models.router,
    )
    groups = build_groups(module.named_trainables(), config=config.optim)
    note_groups(groups, config=config, folder=folder, ranks=ranks, resumed=resumed)
    return Parts(
        config=config,
        ranks=ranks,
        device=device(),
        sources=sources,
        student=models.student,
        engine=TrainEngine(module=module, groups=groups, ds_config=trained),
        teacher=models.teacher,
        objective=objective,
        alignment=models.alignment,
        selection=selection,
        watch=GradientWatch(student=models.student, embedding=models.student.model.get_input_embeddings()),
        loader=data.loader,
        evaluation_batches=data.evaluation_batches,
        # Restored by DeepSpeed without learning rate and moments, and without an error.
        resumable=offload_device(placements.student, "offload_optimizer") != "nvme",
        accumulation=accumulation,
        rollouts=rollouts,
        layer_drop=build_layer_drop(config, student=models.student, alignment=models.alignment),
        depths=reduced_depths(config, student=models.student),
        router=models.router,
        router_loads=None if models.router is None else RouterLoads(models.router, device=device()),
    )


@dataclass(frozen=True)
class _Models:
    """Both models with their weights and what joins them, before the student's engine."""

    student: Decoder
    teacher: Teacher
    teacher_decoder: Decoder | None
    alignment: Alignment | None
    teacher_ds_configs: Mapping[str, Any]
    kind: type[DistillModel]
    router: RouterTerms | None = None


def _build_models(
    config: RunConfig,
    *,
    objective: Objective,
    sources: Sources,
    data: RunData,
    placements: Placements,
    trained: dict[str, Any],
    ranks: Ranks,
    folder: Path,
    resumed: bool,
    around: Surroundings | None,
) -> _Models:
    model = build_teacher_model(config, sources=sources, placements=placements, ranks=ranks)
    student = build_student(
        config,
        sources=sources,
        ds_config=trained,
        ranks=ranks,
        resumed=resumed,
        measure=lambda moment: calibrate(
            config,
            sources=sources,
            rows=data.first_rows,
            placements=placements,
            decoder=None if model is None else model.decoder,
            ranks=ranks,
            moment=moment,
        ),
        report_to=partial(write_report, folder=folder, ranks=ranks),
        loads=loads_of(model, config=config, rows=data.first_rows),
    )
    shared = share_backbone(config, student=student, ds_config=trained, ranks=ranks)
    within = shared is not None or config.teacher.kind == "base"
    decoder = student if within else None if model is None else model.decoder
    compared = stored_layers(config) if decoder is None else decoder
    pairs = find_pairs(
        objective,
        config=config,
        student=student,
        teacher=compared,
        rows=data.first_rows,
        folder=folder,
        ranks=ranks,
        resumed=resumed,
    )
    alignment = _build_alignment(
        objective, pairs=pairs, student=student, teacher=compared, ds_config=trained, seed=config.train.seed
    )
    teacher: Teacher
    if shared is None:
        teacher = serve_teacher(config, model=model, sources=sources, ranks=ranks, student=student, around=around)
    else:
        steps = data.loader.total_steps()
        teacher = serve_shared(
            config, student=shared, objective=objective, alignment=alignment, total_steps=steps, ranks=ranks
        )
    router = build_router(
        objective,
        student=student,
        teacher=decoder,
        teacher_kind=config.teacher.kind,
        kept=config.student.teacher_layers,
    )
    plan = AlignmentPlan() if alignment is None else alignment.plan(seed=config.train.seed, step=0)
    plan = plan if router is None else router.extend(plan)
    teacher.check(objective.request(step=0, max_steps=1, taps=plan.teacher))
    teacher.check(objective.evaluation_request)
    kind = DistillModel if shared is None else SelfSharedModel
    if config.teacher.kind == "base":
        kind = BackboneModel
    return _Models(student, teacher, decoder, alignment, teacher_ds_configs(model), kind, router)


def build_distill_model(
    objective: Objective,
    *,
    student: Decoder,
    alignment: Alignment | None = None,
    selection: TokenSelection | None = None,
    kind: type[DistillModel] = DistillModel,
    router: RouterTerms | None = None,
) -> DistillModel:
    """The trainable module of an objective. Errors: ConfigError for layers that cannot be supervised."""
    check_deep_layers(objective.deep_layers, student=student)
    signal = objective.config.signal
    vocabulary = VocabularyPass(
        terms=objective.vocabulary,
        chunk_tokens=objective.config.chunk_tokens,
        sparse=signal.tail if isinstance(signal, TopKSignalConfig) else "tail",
        selection=None if selection is None else selection.rule,
        compile=objective.config.compile,
    )
    return kind(
        student=student,
        vocabulary=vocabulary,
        alignment=alignment,
        deep_layers=objective.deep_layers,
        router=router,
    )


def _build_alignment(
    objective: Objective,
    *,
    pairs: Mapping[str, tuple[LayerPair, ...]],
    student: Decoder,
    teacher: Decoder | StoredLayers | None,
    ds_config: Mapping[str, Any],
    seed: int,
) -> Alignment | None:
    if not pairs:
        return None
    assert teacher is not None
    shapes = {
        side: decoder_shape(model, side=side, pairs=pairs, objective=objective)
        for side, model in (("student", student), ("teacher", teacher))
    }
    with sharded_modules(ds_config, seed=seed):
        return Alignment(objective, pairs=pairs, **shapes)
