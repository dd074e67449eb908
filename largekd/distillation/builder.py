"""The builder: the only file that knows every room."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largekd.config.divergence import TopKSignalConfig
from largekd.config.placement import offload_device
from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.data.loader import RowLoader
from largekd.distillation.backbone import BackboneModel
from largekd.distillation.cache_binding import stored_layers
from largekd.distillation.calibrate import Calibration
from largekd.distillation.groups import note_groups
from largekd.distillation.initialise import write_report
from largekd.distillation.layer_drop import LayerDrop, build_layer_drop, reduced_depths
from largekd.distillation.layers import check_deep_layers, decoder_shape, find_pairs
from largekd.distillation.model import DistillModel
from largekd.distillation.models import Sources, build_student
from largekd.distillation.numerics import GradientWatch
from largekd.distillation.origin import kept_layers, report_folder
from largekd.distillation.prepared import Beginning, Prepared
from largekd.distillation.remote import Surroundings
from largekd.distillation.rollouts import build_rollouts
from largekd.distillation.router import build_router
from largekd.distillation.self_shared import (
    SelfSharedModel,
    serve_shared,
    share_backbone,
)
from largekd.distillation.step import plan_of
from largekd.distillation.teachers import TeacherModel, build_teacher_model, serve_teacher, teacher_ds_configs
from largekd.engine.carried import by_updates, restore_optimizer, restore_shards, updates_of
from largekd.engine.ds_config import train_ds_config
from largekd.engine.train import TrainEngine
from largekd.generation.rollouts import Rollouts
from largekd.models.decoder import Decoder, enable_checkpointing
from largekd.models.frozen_layers import freeze_layers
from largekd.objectives.alignment import Alignment
from largekd.objectives.router import RouterTerms
from largekd.objectives.router_loads import RouterLoads
from largekd.objectives.selection import TokenSelection
from largekd.objectives.terms import Objective
from largekd.objectives.vocabulary import VocabularyPass
from largekd.optim.groups import build_groups, learning
from largekd.runtime.files import write_json
from largekd.runtime.ranks import Ranks, Together
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
    seed: int
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

    @property
    def stateful(self) -> dict[str, Rollouts | RouterLoads | TokenSelection]:
        """What gathers knowledge from step to step beside weights, by the names that checkpoints know."""
        owners = {"rollouts": self.rollouts, "router": self.router_loads, "selection": self.selection}
        return {name: owner for name, owner in owners.items() if owner is not None}

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


def build(
    prepared: Prepared,
    *,
    folder: Path,
    beginning: Beginning,
    around: Surroundings | None = None,
) -> Parts:
    """Build the parts of a phase; `folder` is its stage's. A collective call.

    around: what a teacher that may wait takes from the run.
    Errors: any LargeKDError; the message names the key to change.
    """
    config, ranks, objective, sources = prepared.config, prepared.ranks, prepared.objective, prepared.sources
    trained = train_ds_config(
        prepared.placements.student,
        train=config.train,
        optim=config.optim,
        accumulation=prepared.accumulation,
        world_size=ranks.world_size,
    )
    models = _build_models(prepared, trained=trained, folder=folder, beginning=beginning, around=around)
    student, alignment, router = models.student, models.alignment, models.router
    rollouts = build_rollouts(
        config,
        samples=prepared.data.samples["train"],
        sources=sources,
        student=student,
        teacher_decoder=models.teacher_decoder,
        teacher=models.teacher,
        ranks=ranks,
    )
    with Together():
        if ranks.is_main:
            write_json(
                folder / "deepspeed.json", value={**teacher_ds_configs(models.teacher_model), "student": trained}
            )
    learner = _build_engine(prepared, models=models, trained=trained, folder=folder, beginning=beginning)
    parts = Parts(
        config=config,
        ranks=ranks,
        device=device(),
        sources=sources,
        student=student,
        engine=learner.engine,
        teacher=models.teacher,
        objective=objective,
        alignment=alignment,
        selection=learner.selection,
        watch=GradientWatch(student=student, embedding=student.model.get_input_embeddings()),
        loader=prepared.data.loader,
        evaluation_batches=prepared.data.evaluation_batches,
        # Restored by DeepSpeed without learning rate and moments, and without an error.
        resumable=offload_device(prepared.placements.student, "offload_optimizer") != "nvme",
        accumulation=prepared.accumulation,
        seed=prepared.seed,
        rollouts=rollouts,
        layer_drop=build_layer_drop(config, student=student, alignment=alignment, seed=prepared.seed),
        depths=reduced_depths(config, student=student),
        router=router,
        router_loads=None if router is None else RouterLoads(router, device=device()),
        teacher_model=models.teacher_model,
        trainable=learner.trainable,
        updates=learner.updates,
        thaw=learner.thaw,
    )
    for name, state in ({} if beginning.inherited is None else beginning.inherited.gathered).items():
        parts.stateful[name].restore(state)
    return parts


@dataclass(frozen=True)
class _Learning:
    """The engine and what it was made with."""

    engine: TrainEngine
    selection: TokenSelection | None
    trainable: tuple[nn.Parameter, ...]
    updates: Mapping[str, int]
    thaw: Callable[[], None] | None


def _build_engine(
    prepared: Prepared, *, models: "_Models", trained: dict[str, Any], folder: Path, beginning: Beginning
) -> _Learning:
    """Join the student and its losses, freeze, group, and give them to DeepSpeed with what their weights carry."""
    config, inherited, updates = prepared.config, beginning.inherited, beginning.updates
    chosen = config.objective.selection
    selection = None if chosen is None else TokenSelection(chosen, device=device())
    module = build_distill_model(
        prepared.objective,
        student=models.student,
        alignment=models.alignment,
        selection=selection,
        kind=models.kind,
        router=models.router,
    )
    trainable = tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
    may_learn = learning(module.named_trainables())
    thaw = None if beginning.frozen is None else freeze_layers(models.student.model, frozen=beginning.frozen)
    groups = build_groups(module.named_trainables(), config=config.optim, may_learn=may_learn)
    if inherited is not None:
        updates = updates_of(module.named_trainables(), carried=inherited.carried)
        restore_shards(_own_of_losses(module), carried=inherited.carried)
    note_groups(
        groups, config=config, folder=folder, ranks=prepared.ranks, phase=beginning.phase, first=beginning.is_first
    )
    engine = TrainEngine(module=module, groups=by_updates(groups, updates=updates), ds_config=trained)
    if inherited is not None:
        restore_optimizer(module.named_trainables(), carried=inherited.carried)
    return _Learning(engine=engine, selection=selection, trainable=trainable, updates=updates, thaw=thaw)


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
    kind: type[DistillModel]
    teacher_model: TeacherModel | None
    router: RouterTerms | None = None


def _build_models(
    prepared: Prepared, *, trained: dict[str, Any], folder: Path, beginning: Beginning, around: Surroundings | None
) -> _Models:
    config, sources, objective, ranks = prepared.config, prepared.sources, prepared.objective, prepared.ranks
    kept = None if beginning.inherited is None else beginning.inherited.teacher
    if kept is not None and beginning.inherited is not None:
        model = beginning.inherited.teacher_model
    else:
        model = build_teacher_model(config, sources=sources, placements=prepared.placements, ranks=ranks)
    student = _build_student(prepared, teacher=model, trained=trained, folder=folder, beginning=beginning)
    shared = share_backbone(config, student=student, ds_config=trained, ranks=ranks)
    within = shared is not None or config.teacher.kind == "base"
    decoder = student if within else None if model is None else model.decoder
    compared = stored_layers(config) if decoder is None else decoder
    compares = bool(objective.features or objective.attention or objective.config.router)
    made_of = kept_layers(config, teacher=sources.teacher) if compares else None
    alignment = _build_alignment(
        prepared,
        student=student,
        teacher=compared,
        ds_config=trained,
        folder=folder,
        kept=made_of,
        resumed=beginning.resumed,
    )
    teacher: Teacher
    if kept is not None:
        teacher = kept
    elif shared is None:
        teacher = serve_teacher(config, model=model, sources=sources, ranks=ranks, student=student, around=around)
    else:
        steps = prepared.data.loader.total_steps()
        teacher = serve_shared(
            config, student=shared, objective=objective, alignment=alignment, total_steps=steps, ranks=ranks
        )
    router = build_router(
        objective,
        student=student,
        teacher=decoder,
        teacher_kind=config.teacher.kind,
        kept=made_of,
    )
    plan = plan_of(alignment, step=0, seed=prepared.seed, router=router)
    teacher.check(objective.request(step=0, max_steps=1, taps=plan.teacher))
    teacher.check(objective.evaluation_request)
    kind = DistillModel if shared is None else SelfSharedModel
    if config.teacher.kind == "base":
        kind = BackboneModel
    return _Models(student, teacher, decoder, alignment, kind, model, router)


def _build_student(
    prepared: Prepared, *, teacher: TeacherModel | None, trained: dict[str, Any], folder: Path, beginning: Beginning
) -> Decoder:
    """The student of the phase before, or the run's first."""
    config, ranks = prepared.config, prepared.ranks
    if beginning.inherited is not None:
        _set_checkpointing(beginning.inherited.student, wanted=config.train.activation_checkpointing)
        return beginning.inherited.student
    return build_student(
        config,
        sources=prepared.sources,
        ds_config=trained,
        ranks=ranks,
        resumed=beginning.resumed,
        measures=Calibration(
            config,
            sources=prepared.sources,
            rows=prepared.data.first_rows,
            placements=prepared.placements,
            decoder=None if teacher is None else teacher.decoder,
            ranks=ranks,
        ),
        report_to=partial(write_report, folder=report_folder(config), ranks=ranks),
    )


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
    prepared: Prepared,
    *,
    student: Decoder,
    teacher: Decoder | StoredLayers | None,
    ds_config: Mapping[str, Any],
    folder: Path,
    kept: Sequence[int] | None,
    resumed: bool,
) -> Alignment | None:
    """The alignment of the paired layers, None without pairs."""
    objective, config = prepared.objective, prepared.config
    pairs = find_pairs(
        objective,
        config=config,
        student=student,
        teacher=teacher,
        rows=prepared.data.first_rows,
        folder=folder,
        ranks=prepared.ranks,
        kept=kept,
        resumed=resumed,
    )
    if not pairs:
        return None
    assert teacher is not None
    shapes = {
        side: decoder_shape(model, side=side, pairs=pairs, objective=objective)
        for side, model in (("student", student), ("teacher", teacher))
    }
    with sharded_modules(ds_config, seed=config.train.seed):
        return Alignment(objective, pairs=pairs, **shapes)
