"""The builder: the only file that knows every room."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from largekd.config.checks import check_world
from largekd.config.divergence import TopKSignalConfig
from largekd.config.placement import Placements, offload_device, read_placements
from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.data.loader import RowLoader
from largekd.distillation.backbone import BackboneModel
from largekd.distillation.cache_binding import check_teacher_data, stored_layers
from largekd.distillation.calibrate import Calibration
from largekd.distillation.data import RunData, build_data
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
from largekd.distillation.teachers import TeacherModel, build_teacher_model, serve_teacher, teacher_ds_configs
from largekd.engine.carried import Carried, by_updates, restore_optimizer, restore_shards, updates_of
from largekd.engine.ds_config import train_ds_config
from largekd.engine.train import TrainEngine
from largekd.generation.rollouts import Rollouts
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.frozen_layers import FrozenLayers, freeze_layers
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
    teacher_model: TeacherModel | None = None
    trainable: tuple[nn.Parameter, ...] = ()
    updates: Mapping[str, int] = field(default_factory=dict)
    thaw: Callable[[], None] | None = None

    def named_trainables(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the engine's module under the names that a user knows."""
        module = self.engine.module
        assert isinstance(module, DistillModel)
        return module.named_trainables()

    def close(self) -> None:
        """Take both engines down."""
        self.teacher.close()
        self.leave()

    def leave(self) -> None:
        """Take down what is this phase's own: the student's engine and the hooks; all weights may learn again."""
        self.engine.close()
        self.watch.close()
        if self.thaw is not None:
            self.thaw()
        for parameter in self.trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class Prepared:
    """What a stage is built from, checked and read before any weight is touched."""

    accumulation: int
    placements: Placements
    objective: Objective
    sources: Sources
    data: RunData


@dataclass(frozen=True)
class Inherited:
    """What a phase takes over from the one before: the student, what its weights carry, and a teacher that stays."""

    student: Decoder
    carried: Mapping[str, Carried]
    teacher: Teacher | None = None
    teacher_model: TeacherModel | None = None


def prepare(
    config: RunConfig,
    *,
    ranks: Ranks,
    folder: Path,
    control: dist.ProcessGroup | None = None,
    row_seed: int | None = None,
) -> Prepared:
    """Check a stage and read its data, cheapest first. A collective call; `control` is for what may take long.

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
    data = build_data(config, sources=sources, ranks=ranks, folder=folder, first=first, row_seed=row_seed)
    check_teacher_data(config, sources=sources, samples=data.samples)
    return Prepared(accumulation, placements, objective, sources, data)


def build(
    config: RunConfig,
    *,
    prepared: Prepared,
    ranks: Ranks,
    folder: Path,
    resumed: bool = False,
    around: Surroundings | None = None,
    frozen: FrozenLayers | None = None,
    inherited: Inherited | None = None,
    updates: Mapping[str, int] | None = None,
    phase: int = 0,
) -> Parts:
    """Build the parts of a phase. A collective call.

    resumed: a checkpoint will be loaded into the parts, or an earlier phase of the stage has paired the layers. around:
    what a teacher that may wait takes from the run. inherited: of the phase before; None: the run's first weights.
    phase: its place in the run. updates: of a checkpoint, see Journal; with `inherited` they follow from that.

    Errors: any LargeKDError; the message names the key to change.
    """
    objective, sources, data, placements = prepared.objective, prepared.sources, prepared.data, prepared.placements
    trained = train_ds_config(
        placements.student,
        train=config.train,
        optim=config.optim,
        accumulation=prepared.accumulation,
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
        inherited=inherited,
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
    trainable = tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
    thaw = None if frozen is None else freeze_layers(models.student.model, frozen=frozen)
    groups = build_groups(module.named_trainables(), config=config.optim)
    if inherited is not None:
        updates = updates_of(module.named_trainables(), carried=inherited.carried)
        restore_shards(_own_of_losses(module), carried=inherited.carried)
    note_groups(groups, config=config, folder=folder, ranks=ranks, phase=phase, first=not resumed and inherited is None)
    groups = by_updates(groups, updates=updates or {})
    engine = TrainEngine(module=module, groups=groups, ds_config=trained)
    if inherited is not None:
        restore_optimizer(module.named_trainables(), carried=inherited.carried)
    return Parts(
        config=config,
        ranks=ranks,
        device=device(),
        sources=sources,
        student=models.student,
        engine=engine,
        teacher=models.teacher,
        objective=objective,
        alignment=models.alignment,
        selection=selection,
        watch=GradientWatch(student=models.student, embedding=models.student.model.get_input_embeddings()),
        loader=data.loader,
        evaluation_batches=data.evaluation_batches,
        # Restored by DeepSpeed without learning rate and moments, and without an error.
        resumable=offload_device(placements.student, "offload_optimizer") != "nvme",
        accumulation=prepared.accumulation,
        rollouts=rollouts,
        layer_drop=build_layer_drop(config, student=models.student, alignment=models.alignment),
        depths=reduced_depths(config, student=models.student),
        router=models.router,
        router_loads=None if models.router is None else RouterLoads(models.router, device=device()),
        teacher_model=models.teacher_model,
        trainable=trainable,
        updates=updates or {},
        thaw=thaw,
    )


def _own_of_losses(module: DistillModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are not the student's: modules that every phase makes anew."""
    students = {id(parameter) for parameter in module.student.parameters()}
    return ((name, weight) for name, weight in module.named_trainables() if id(weight) not in students)


@dataclass(frozen=True)
class _Models:
    """Both models with their weights and what joins them, before the student's engine."""

    student: Decoder
    teacher: Teacher
    teacher_decoder: Decoder | None
    alignment: Alignment | None
    teacher_ds_configs: Mapping[str, Any]
    kind: type[DistillModel]
    teacher_model: TeacherModel | None
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
    inherited: Inherited | None,
) -> _Models:
    kept = None if inherited is None else inherited.teacher
    if kept is not None and inherited is not None:
        model = inherited.teacher_model
    else:
        model = build_teacher_model(config, sources=sources, placements=placements, ranks=ranks)
    if inherited is None:
        student = build_student(
            config,
            sources=sources,
            ds_config=trained,
            ranks=ranks,
            resumed=resumed,
            measures=Calibration(
                config,
                sources=sources,
                rows=data.first_rows,
                placements=placements,
                decoder=None if model is None else model.decoder,
                ranks=ranks,
            ),
            report_to=partial(write_report, folder=folder, ranks=ranks),
        )
    else:
        student = inherited.student
        _set_checkpointing(student, wanted=config.train.activation_checkpointing)
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
    if kept is not None:
        teacher = kept
    elif shared is None:
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
    return _Models(student, teacher, decoder, alignment, teacher_ds_configs(model), kind, model, router)


def _set_checkpointing(student: Decoder, *, wanted: bool) -> None:
    if wanted:
        enable_checkpointing(student.model)
    elif any(getattr(module, "gradient_checkpointing", False) for module in student.model.modules()):
        student.model.gradient_checkpointing_disable()


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
