"""The whole configuration of one run."""

from typing import ClassVar

from pydantic import Field

from largekd.config.cache import CacheConfig
from largekd.config.common import Frozen
from largekd.config.data import DataConfig, EvalConfig
from largekd.config.model import StudentConfig
from largekd.config.objective import ObjectiveConfig
from largekd.config.output import CheckpointConfig, ExportConfig, LogConfig, RunFolderConfig
from largekd.config.rollouts import RolloutConfig
from largekd.config.stages import StageConfig
from largekd.config.teacher import TeacherConfig
from largekd.config.train import OptimConfig, TrainConfig


class RunConfig(Frozen):
    """One YAML file under recipes/ is one of these."""

    default_kinds: ClassVar[dict[str, str]] = {"teacher": "online"}

    run: RunFolderConfig
    teacher: TeacherConfig = Field(description="Source of the signals that the student learns from.")
    student: StudentConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    rollouts: RolloutConfig | None = Field(
        None, description="Rows that the student or the teacher writes during the run; null: the data alone."
    )
    plugins: tuple[str, ...] = Field(
        (), description="Python modules (dotted name, or path of a .py file) with TERMS = {name: function}."
    )
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    stages: tuple[StageConfig, ...] = Field((), description="Parts of the run that differ; none: the run is one.")
    cache: CacheConfig | None = Field(None, description="What launch/cache_teacher.py stores; training ignores it.")
