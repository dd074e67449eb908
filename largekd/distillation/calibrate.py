"""The teacher's activation statistics, for the rules of initialisation that look at them."""

import logging
from collections.abc import Callable, Iterator

from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.distillation.models import Sources
from largekd.engine.ds_config import frozen_ds_config
from largekd.initialisation.calibration import measure
from largekd.initialisation.statistics import Statistics
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


def calibrate(
    config: RunConfig,
    *,
    sources: Sources,
    rows: Callable[[int], Iterator[Batch]],
    placements: Placements,
    decoder: Decoder | None,
    ranks: Ranks,
    moment: bool,
) -> Statistics:
    """Measure the teacher on the first `student.initialise.calibration_rows` rows of data.train. A collective call.

    rows: gives so many first rows, this rank's share of them. decoder: the sharded teacher before its engine; None
    where this job has none (a cached or remote teacher), or none yet: it is then loaded for the measurement alone.
    moment: also the second moment of the residual stream.
    """
    assert config.student.initialise is not None
    count = config.student.initialise.calibration_rows
    decoder = decoder or _loaded(config, sources=sources, placements=placements, ranks=ranks)
    found = measure(decoder, batches=rows(count), moment=moment)
    if ranks.is_main:
        logger.info(
            "student.initialise: measured the teacher on %s positions; influence of its layers %s",
            f"{found.positions:,.0f}",
            " ".join(f"{value:.3f}" for value in found.influence_N.tolist()),
        )
    return found


def _loaded(config: RunConfig, *, sources: Sources, placements: Placements, ranks: Ranks) -> Decoder:
    """The teacher's own weights in shards, where the teacher's placement puts them, or else the student's."""
    folder = sources.teacher
    placement = next(iter(placements.teachers.values()), placements.student)
    model = build_model(
        folder.config,
        ds_config=frozen_ds_config(placement, train=config.train, world_size=ranks.world_size),
        precision=config.train.precision,
        attention=getattr(config.teacher, "attention", config.student.attention),
        trust_remote_code=folder.trust_remote_code,
        key="teacher",
    )
    load_pretrained(model, folder=folder.path, rank=ranks.rank)
    return Decoder(model=model)
