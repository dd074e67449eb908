"""What the ranks do in the tests of calibrated rules: measure a sharded teacher, and fill a sharded student from it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from alignment_reference import aligned_rows, join
from layer_jobs import sharded
from sharding_jobs import ds_config, whole

from largekd.config.initialise import InitialiseConfig
from largekd.contracts import IGNORE_LABEL, Batch
from largekd.distillation.initialise import initialise_student
from largekd.engine.frozen import FrozenEngine
from largekd.initialisation.axes import Mix, StudentMaps
from largekd.initialisation.calibration import measure
from largekd.initialisation.derive import derivations
from largekd.initialisation.expert_maps import LayerLoads
from largekd.initialisation.fill import fill_from
from largekd.initialisation.importance import importance_maps
from largekd.initialisation.rotation import check_rotatable, fold_norms, rotated_ends, rotated_maps
from largekd.initialisation.sizes import sizes_of
from largekd.initialisation.statistics import Statistics
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder
from largekd.models.source import ModelFolder, read_config
from largekd.runtime.ranks import Ranks


def filler(row: Batch) -> Batch:
    """A weightless row as the loader makes them: no samples, but something to read."""
    return replace(
        row,
        labels_BS=torch.full_like(row.labels_BS, IGNORE_LABEL),
        counted_T=row.counted_T[:0],
        attention_mask_BS=None if row.attention_mask_BS is None else torch.ones_like(row.attention_mask_BS),
        segments=((),),
        segment_BS=None if row.segment_BS is None else torch.zeros_like(row.segment_BS),
    )


def own_batches(*, rows: int, per_batch: int, packed: bool) -> Iterator[Batch]:
    """This rank's rows in micro-batches, filled up so that all ranks have the same number."""
    all_rows = aligned_rows(count=rows, packed=packed)
    size = per_batch * dist.get_world_size()
    if all_rows:
        all_rows += [filler(all_rows[0])] * (-len(all_rows) % size)
    for start in range(dist.get_rank() * per_batch, len(all_rows), size):
        yield join(all_rows[start : start + per_batch])


def measured(
    *, folder: str, packed: bool = True, rows: int = 7, per_batch: int = 1, moment: bool = True, engine: bool = False
) -> dict[str, Any]:
    """The statistics of the model in `folder`, and the hooks that are left on it."""
    decoder, frozen = sharded(folder)
    held = FrozenEngine(module=decoder, ds_config=frozen) if engine else None
    before = _hooks(decoder)
    batches = own_batches(rows=rows, per_batch=per_batch, packed=packed)
    found = measure(decoder, batches=batches, engine=held, moment=moment)
    left = _hooks(decoder) - before
    if held is not None:
        held.close()
    return {**vars(found), "hooks": left}


def student_weights(
    *, teacher: str, config: str, rule: str, layers: list[int], rows: int = 7
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Whole tensors of a student of the shape in the folder `config`, filled by `rule`, and the report."""
    decoder, _ = sharded(teacher)
    statistics = measure(decoder, batches=own_batches(rows=rows, per_batch=2, packed=True), moment=rule == "pca")
    student_config = read_config(Path(config), key="student.config", trust_remote_code=False)
    model = build_model(student_config, ds_config=ds_config(), precision="fp32", attention="sdpa")
    made = _derived(decoder, model, statistics=statistics, rule=rule, layers=layers)
    report = fill_from(model, derivations=made, folder=Path(teacher), rank=dist.get_rank(), seed=0)
    return whole(model), report.as_mapping()


def _derived(decoder: Decoder, model: Any, *, statistics: Statistics, rule: str, layers: list[int]) -> Any:
    teacher, student = decoder.model.config, model.config
    sizes = {"teacher": sizes_of(teacher), "student": sizes_of(student)}
    maps: StudentMaps = importance_maps(statistics, layers=layers, width=rule != "pca", **sizes)
    if rule != "pca":
        return derivations(model, maps=maps, teacher_config=teacher, seed=0)
    check_rotatable(student)
    assert statistics.moment_DD is not None
    maps = rotated_maps(maps, moment_DD=statistics.moment_DD, width=student.hidden_size)
    return derivations(
        model,
        maps=maps,
        teacher_config=teacher,
        seed=0,
        prepare=fold_norms(model),
        given=rotated_ends(model, maps=maps, teacher_config=teacher),
    )


class Measured:
    """The activations of the teacher in a folder; `asked` counts how often they were wanted."""

    def __init__(self, folder: str) -> None:
        self.folder, self.asked = folder, 0

    def statistics(self, *, moment: bool) -> Statistics:
        self.asked += 1
        config = read_config(Path(self.folder), key="teacher.model", trust_remote_code=False)
        model = build_model(config, ds_config=ds_config(), precision="fp32", attention="eager")
        load_pretrained(model, folder=Path(self.folder), rank=dist.get_rank())
        batches = own_batches(rows=4, per_batch=2, packed=False)
        return measure(Decoder(model=model), batches=batches, moment=moment)

    def loads(self) -> dict[int, LayerLoads]:
        raise AssertionError("no student here has other experts")

    def release(self) -> None:
        """Each measurement loads its own."""


def initialised_by_rules(*, teacher: str, student: str, initialise: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The plan of the report of a student that `initialise_student` fills, and how often the teacher was measured."""
    theirs, ours = (
        read_config(Path(folder), key=key, trust_remote_code=False)
        for folder, key in ((teacher, "teacher.model"), (student, "student.config"))
    )
    model = build_model(ours, ds_config=ds_config(), precision="fp32", attention="eager")
    measures = Measured(teacher)
    report = initialise_student(
        model,
        config=InitialiseConfig.model_validate(initialise),
        teacher=ModelFolder(path=Path(teacher), config=theirs, trust_remote_code=False),
        seed=0,
        ranks=Ranks(rank=dist.get_rank(), world_size=dist.get_world_size()),
        measures=measures,
    )
    assert all(bool(value.isfinite().all()) for value in whole(model).values())
    return dict(report.plan), measures.asked


def _hooks(decoder: Decoder) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in decoder.modules())


def moment_of_rank(rank: int) -> torch.Tensor:
    """A second moment that is another one on every rank, as if they had rounded differently."""
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return rows.T @ rows / len(rows)


def rotated_by_own_moment(*, width: int) -> tuple[torch.Tensor, float]:
    """The map of hidden units and its gain."""
    maps = rotated_maps(StudentMaps(layers=()), moment_DD=moment_of_rank(dist.get_rank()), width=width)
    assert isinstance(maps.width, Mix)
    return maps.width.matrix_NM, maps.gains["width"]
