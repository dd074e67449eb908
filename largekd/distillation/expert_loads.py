"""Watching the teacher's routers before the student is made of it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.distillation.initialise import Loads
from largekd.distillation.teachers import TeacherModel
from largekd.initialisation.expert_maps import LayerLoads
from largekd.initialisation.loads import measure_loads
from largekd.models.decoder import Decoder


def loads_of(
    teacher: TeacherModel | None, *, config: RunConfig, rows: Callable[[int], Iterator[Batch]]
) -> Loads | None:
    """Measures on the first student.initialise.calibration_rows of data.train; None without a teacher in this job."""
    if teacher is None or teacher.decoder is None or config.student.initialise is None:
        return None
    return partial(_measured, teacher.decoder, rows=rows, count=config.student.initialise.calibration_rows)


def _measured(teacher: Decoder, *, rows: Callable[[int], Iterator[Batch]], count: int) -> Mapping[int, LayerLoads]:
    return measure_loads(teacher, batches=rows(count))
