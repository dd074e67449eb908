"""What the teacher does on some text, for the rules of initialisation that look at it."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from largekd.config.placement import Placements
from largekd.config.run import RunConfig
from largekd.contracts import Batch
from largekd.distillation.models import Sources
from largekd.engine.ds_config import frozen_ds_config
from largekd.initialisation.calibration import measure
from largekd.initialisation.expert_maps import LayerLoads
from largekd.initialisation.loads import measure_loads
from largekd.initialisation.statistics import Statistics
from largekd.models.build import build_model, load_pretrained
from largekd.models.decoder import Decoder
from largekd.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Measures the teacher on the first `student.initialise.calibration_rows` rows of data.train.

    rows: gives so many first rows, this rank's share of them. decoder: the sharded teacher before its engine; None
    where this job has none (a cached or remote teacher), or none yet: it is then loaded once, to be measured alone.
    """

    config: RunConfig
    sources: Sources
    rows: Callable[[int], Iterator[Batch]]
    placements: Placements
    decoder: Decoder | None
    ranks: Ranks

    def statistics(self, *, moment: bool) -> Statistics:
        """Activation statistics; `moment`: also the second moment of the residual stream. A collective call."""
        found = measure(self._teacher, batches=self._batches(), moment=moment)
        if self.ranks.is_main:
            logger.info(
                "student.initialise: measured the teacher on %s positions; influence of its layers %s",
                f"{found.positions:,.0f}",
                " ".join(f"{value:.3f}" for value in found.influence_N.tolist()),
            )
        return found

    def loads(self) -> Mapping[int, LayerLoads]:
        """How much the teacher's routers use each expert, by layer. A collective call."""
        return measure_loads(self._teacher, batches=self._batches())

    def release(self) -> None:
        """Let a teacher go that was loaded to be measured alone: the student is filled in its place."""
        # A sharded model is full of cycles: until they are collected its shards stay.
        if self.__dict__.pop("_teacher", None) is not None and self.decoder is None:
            gc.collect()

    def _batches(self) -> Iterator[Batch]:
        assert self.config.student.initialise is not None
        return self.rows(self.config.student.initialise.calibration_rows)

    @cached_property
    def _teacher(self) -> Decoder:
        return self.decoder or self._loaded()

    def _loaded(self) -> Decoder:
        """The teacher's own weights in shards, where the teacher's placement puts them, or else the student's."""
        config, folder = self.config, self.sources.teacher
        placement = next(iter(self.placements.teachers.values()), self.placements.student)
        model = build_model(
            folder.config,
            ds_config=frozen_ds_config(placement, train=config.train, world_size=self.ranks.world_size),
            precision=config.train.precision,
            attention=getattr(config.teacher, "attention", config.student.attention),
            trust_remote_code=folder.trust_remote_code,
            key="teacher",
        )
        load_pretrained(model, folder=folder.path, rank=self.ranks.rank)
        return Decoder(model=model)
