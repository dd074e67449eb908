"""What the ranks do in the tests of experts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharding_jobs import build, ds_config, whole
from tiny import make_rows
from transformers import PreTrainedModel

from largekd.config.initialise import InitialiseConfig
from largekd.distillation.initialise import initialise_student
from largekd.initialisation.expert_maps import LayerLoads
from largekd.initialisation.loads import measure_loads
from largekd.initialisation.statistics import Statistics
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder
from largekd.models.source import ModelFolder, read_config
from largekd.runtime.ranks import Ranks
from largekd.sharding.shards import gathering_forward


def teacher_decoder(folder: str) -> Decoder:
    model = build(folder)
    load_pretrained(model, folder=Path(folder), rank=dist.get_rank())
    return Decoder(model=model)


def measured(*, folder: str, count: int = 8) -> dict[str, Any]:
    """The loads of a mixture over some rows, which the ranks share out."""
    return measure_loads(teacher_decoder(folder), batches=_rows(count))


class Unasked:
    """For students that need no measurement."""

    def statistics(self, *, moment: bool) -> Statistics:
        raise AssertionError("nobody needs the teacher's activations here")

    def loads(self) -> Mapping[int, LayerLoads]:
        raise AssertionError("nobody needs the teacher's routers here")

    def release(self) -> None:
        """There is nothing to let go."""


class Watching(Unasked):
    """Only the routers of the mixture in a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def loads(self) -> Mapping[int, LayerLoads]:
        return measured(folder=self.folder)


def initialised(
    *, teacher: str, student: str, initialise: Mapping[str, Any], watch: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights of the student that config.json in `student` describes, and the report."""
    model, report = _student(teacher=teacher, student=student, initialise=initialise, watch=watch)
    return whole(model), report


def _student(
    *, teacher: str, student: str, initialise: Mapping[str, Any], watch: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    config = read_config(Path(student), key="student.config", trust_remote_code=False)
    model = build_model(config, ds_config=ds_config(), precision="fp32", attention="sdpa")
    theirs = read_config(Path(teacher), key="teacher.model", trust_remote_code=False)
    report = initialise_student(
        model,
        config=InitialiseConfig.model_validate(initialise),
        teacher=ModelFolder(path=Path(teacher), config=theirs, trust_remote_code=False),
        seed=3,
        ranks=Ranks(rank=dist.get_rank(), world_size=dist.get_world_size()),
        measures=Watching(teacher) if watch else Unasked(),
    )
    return model, report.as_mapping()


def _rows(count: int) -> list[Any]:
    rows = make_rows(count=count, packed=True, seed=4)
    return rows[dist.get_rank() :: dist.get_world_size()]


def initialised_logits(*, teacher: str, student: str, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the initialised student, which stays in shards."""
    model, _ = _student(teacher=teacher, student=student, initialise={}, watch=False)
    with torch.no_grad(), gathering_forward(model):
        return model.eval()(ids, use_cache=False).logits
