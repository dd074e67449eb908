"""What the ranks do in the tests of initialisation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from sharding_jobs import ds_config, whole

from largekd.config.load import parse_config
from largekd.distillation.student_only import write_student
from largekd.initialisation.derive import derivations
from largekd.initialisation.fill import fill_from
from largekd.initialisation.sizes import sizes_of
from largekd.initialisation.width import plain_maps
from largekd.models.build import build_model
from largekd.models.source import read_config


def write_student_folder(*, tree: Mapping[str, Any], output: str) -> str:
    """The launcher's work in this process."""
    return str(write_student(parse_config(tree), output=output))


def filled_weights(
    *, teacher: str, student: str, drawn: tuple[str, ...] = (), even: bool = False, zero: dict | None = None
) -> dict[str, Any]:
    """A sharded student filled from its teacher, parameters that end in `drawn` by the family's own draw."""
    shape, theirs = (read_config(Path(path), key="model", trust_remote_code=False) for path in (student, teacher))
    model = build_model(shape, ds_config=ds_config(zero=zero), precision="fp32", attention="sdpa")
    maps = plain_maps(
        teacher=sizes_of(theirs),
        student=sizes_of(shape),
        layers=range(shape.num_hidden_layers),
        even=even,
        gain=0.5,
    )
    given = {name: None for name, _ in model.named_parameters() if name.endswith(drawn)} if drawn else {}
    made = derivations(model, maps=maps, teacher_config=theirs, seed=3, given=given)
    report = fill_from(model, derivations=made, folder=Path(teacher), rank=dist.get_rank(), seed=3)
    return {"weights": whole(model), "report": report.as_mapping()}
