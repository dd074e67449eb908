"""What the ranks do in the tests of experts."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharding_jobs import build, ds_config, whole
from tiny import make_rows

from largekd.config.initialise import InitialiseConfig
from largekd.distillation.initialise import initialise_student
from largekd.initialisation.loads import measure_loads
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder
from largekd.models.source import ModelFolder, read_config
from largekd.runtime.ranks import Ranks


def teacher_decoder(folder: str) -> Decoder:
    model = build(folder)
    load_pretrained(model, folder=Path(folder), rank=dist.get_rank())
    return Decoder(model=model)


def measured(*, folder: str, count: int = 8) -> dict[str, Any]:
    """The loads of a mixture over some rows, which the ranks share out."""
    return measure_loads(teacher_decoder(folder), batches=_rows(count))


def initialised(
    *, teacher: str, student: str, initialise: Mapping[str, Any], watch: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of the student that config.json in `student` describes, and the report."""
    config = read_config(Path(student), key="student.config", trust_remote_code=False)
    model = build_model(config, ds_config=ds_config(), precision="fp32", attention="sdpa")
    theirs = read_config(Path(teacher), key="teacher.model", trust_remote_code=False)
    report = initialise_student(
        model,
        config=InitialiseConfig.model_validate(initialise),
        teacher=ModelFolder(path=Path(teacher), config=theirs, trust_remote_code=False),
        seed=3,
        ranks=Ranks(rank=dist.get_rank(), world_size=dist.get_world_size()),
        loads=partial(measured, folder=teacher) if watch else None,
    )
    return whole(model), report.as_mapping()


def _rows(count: int) -> list[Any]:
    rows = make_rows(count=count, packed=True, seed=4)
    return rows[dist.get_rank() :: dist.get_world_size()]
