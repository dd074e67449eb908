"""A run as a sequence of stages, each with a whole configuration of its own."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from largekd.config.checks import check_config
from largekd.config.parse import read_record
from largekd.config.problems import shown
from largekd.config.render import config_to_mapping
from largekd.config.run import RunConfig
from largekd.config.stages import StageConfig
from largekd.config.teacher import CachedTeacherConfig, MixtureTeacherConfig, RoutedWeightsConfig, TeacherConfig
from largekd.errors import ConfigError

_DURATIONS = ("steps", "tokens", "epochs")
_SINGLE_NAME = "run"
# Why a key is the same in all stages.
_FIXED: Mapping[str, str] = {
    "run": "a run has one folder",
    "student": "the student goes through all stages as it is",
    "stages": "stages do not hold stages",
    "log": "all stages write to the same files",
    "checkpoint": "all stages save to the same folder",
    "export": "a run is exported once, at its end",
    "plugins": "modules are imported once",
    "cache": "training ignores it",
    "train.max_steps": "the stage's own `steps`, `tokens` or `epochs` say how long it is",
    "train.max_epochs": "the stage's own `steps`, `tokens` or `epochs` say how long it is",
    "train.precision": "weights keep their dtype",
    "train.seed": "a stage draws its own order of rows from the run's seed",
    "train.collective_timeout_s": "it is set when the process group starts",
}
# Below a fixed key, and free all the same.
_FREE = ("student.layer_drop",)
# What tells one record of a union from another: a mapping that names another one replaces, and does not merge.
_KINDS = ("kind", "map", "shape")


@dataclass(frozen=True)
class Stage:
    """One stage: `config` is what a run of this stage alone would have, with the length in `train`."""

    index: int
    name: str
    config: RunConfig
    keep_optimizer: bool = False


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a checked configuration; a run without any is one stage."""
    if not config.stages:
        return (Stage(index=0, name=_SINGLE_NAME, config=config),)
    stages = []
    for index, stage in enumerate(config.stages):
        merged, found = _stage_config(config, stage=stage, index=index)
        assert merged is not None, found
        stages.append(Stage(index=index, name=stage.name, config=merged, keep_optimizer=stage.keep_optimizer))
    return tuple(stages)


def stage_named(config: RunConfig, *, name: str | None) -> Stage:
    """A stage of a run by its name; None: the first. Errors: ConfigError for a name that no stage has."""
    stages = stages_of(config)
    if name is None:
        return stages[0]
    names = [stage.name for stage in stages] if config.stages else []
    if name not in names:
        known = ", ".join(map(repr, names)) or "none: the run has no stages"
        raise ConfigError(f"--stage {name!r}: the stages of this run are {known}.")
    return stages[names.index(name)]


def stages_to_cache(config: RunConfig, *, name: str | None) -> tuple[Stage, ...]:
    """The stages that one cache serves: `name` (None: the first), and behind it the others with its rows.

    Errors: ConfigError where no name is given and stages have unlike rows, which no one cache holds.
    """
    chosen = stage_named(config, name=name)
    alike = [chosen]
    others: list[Stage] = []
    for stage in stages_of(config):
        if stage.index != chosen.index:
            (alike if _rows(stage.config) == _rows(chosen.config) else others).append(stage)
    if name is None and others:
        raise ConfigError(
            f"stages: {', '.join(repr(stage.name) for stage in others)} read other rows (train.sequence_length or "
            f"data) than {chosen.name!r}, and a cache holds one kind; name the stage whose rows to cache with --stage, "
            "and make one cache for each kind."
        )
    return tuple(alike)


def _rows(config: RunConfig) -> tuple[Any, ...]:
    data = config.data
    return config.train.sequence_length, data.train, data.eval, data.packing


def check_stages(config: RunConfig) -> list[str]:
    """What is wrong with the stages of a configuration that is sound without them, one line each."""
    if not config.stages:
        return []
    found = [*_whole(config)]
    configs: list[RunConfig] = []
    for index, stage in enumerate(config.stages):
        wrong = [*_duration(stage, index=index), *_fixed(stage, index=index)]
        if not wrong:
            merged, wrong = _stage_config(config, stage=stage, index=index)
            if merged is not None and not wrong:
                configs.append(merged)
        found += wrong
    if len(configs) == len(config.stages):
        found += _sequence(configs, stages=config.stages)
    return found


def keeps_teacher(before: RunConfig, after: RunConfig) -> bool:
    """Whether the teacher of one stage serves the next one too, with its weights and what it has learnt."""
    teacher = after.teacher
    if before.teacher != teacher or before.objective.translation != after.objective.translation:
        return False
    if not isinstance(teacher, MixtureTeacherConfig):
        return teacher.kind in ("online", "ema")
    if any(isinstance(member.teacher, CachedTeacherConfig) for member in teacher.members):
        # A cache is bound to the rows and to what the objective reads of it.
        return (before.data, before.objective) == (after.data, after.objective) and _row_shape(before) == _row_shape(
            after
        )
    # A mixture that is routed by the records knows their columns.
    return not isinstance(teacher.weighting, RoutedWeightsConfig) or before.data == after.data


def _row_shape(config: RunConfig) -> tuple[int, int]:
    return config.train.sequence_length, config.train.micro_batch_size


def same_held_out(before: RunConfig, after: RunConfig) -> bool:
    """Whether both stages evaluate on the same tokens."""
    first, second = (
        (config.data.eval, config.data.packing, config.train.sequence_length, config.eval.max_rows)
        for config in (before, after)
    )
    return first == second


def _whole(config: RunConfig) -> Iterator[str]:
    for key in ("max_steps", "max_epochs"):
        value = getattr(config.train, key)
        if value is not None:
            yield f"train.{key} = {value}: the stages say how long the run is; remove it"
    for name, count in Counter(stage.name for stage in config.stages).items():
        if count > 1:
            yield f"stages: the name {name!r} is used {count} times; names must differ"
    if config.teacher.kind == "self_shared":
        yield "stages: teacher.kind = 'self_shared' prunes on a schedule over one run; remove the stages"


def _duration(stage: StageConfig, *, index: int) -> Iterator[str]:
    given = [name for name in _DURATIONS if getattr(stage, name) is not None]
    if len(given) != 1:
        how = "none of them is" if not given else f"{' and '.join(given)} are"
        yield f"stages.{index} ({stage.name!r}): {how} set; a stage needs one of steps, tokens, epochs"


def _fixed(stage: StageConfig, *, index: int) -> Iterator[str]:
    for key in _leaves(nested(stage.set)):
        if key.startswith(_FREE):
            continue
        for fixed, reason in _FIXED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                yield f"stages.{index}.set.{key}: {fixed} may not differ between stages: {reason}"


def _stage_config(config: RunConfig, *, stage: StageConfig, index: int) -> tuple[RunConfig | None, list[str]]:
    """The stage's whole configuration, or None; and what is wrong with it."""
    changes = nested(stage.set)
    tree = _merged(config_to_mapping(config), changes)
    tree["stages"] = []
    train = tree["train"] if isinstance(tree["train"], dict) else {}
    train |= {"max_steps": stage.steps, "max_epochs": stage.epochs}
    merged, found = read_record(RunConfig, mapping=tree)
    if merged is not None and stage.tokens is not None:
        positions = merged.train.global_batch_size * merged.train.sequence_length
        steps = -(-stage.tokens // positions)
        merged = merged.model_copy(update={"train": merged.train.model_copy(update={"max_steps": steps})})
    if merged is not None:
        found = check_config(merged, begins=index == 0)
    return merged, [_placed(line, changes=changes, stage=stage, index=index) for line in found]


def _placed(line: str, *, changes: Mapping[str, Any], stage: StageConfig, index: int) -> str:
    """A line about a key of the merged configuration, with the place where the stage has set it."""
    key = line.split(" ", 1)[0].rstrip(":")
    own = any(key == leaf or key.startswith(f"{leaf}.") or leaf.startswith(f"{key}.") for leaf in _leaves(changes))
    return f"stages.{index}.set.{line}" if own else f"stages.{index} ({stage.name!r}): {line}"


def _sequence(configs: list[RunConfig], *, stages: tuple[StageConfig, ...]) -> Iterator[str]:
    """Rules that join one stage with those before it."""
    first = configs[0]
    made_of_teacher = first.student.model is None and first.student.config is None
    for index, (config, stage) in enumerate(zip(configs, stages, strict=True)):
        place = f"stages.{index} ({stage.name!r})"
        kind = config.teacher.kind
        if kind == "self_shared" and first.teacher.kind != kind:
            yield f"{place}: teacher.kind = 'self_shared' needs a run without stages"
        if index and kind == "ema" and not keeps_teacher(configs[index - 1], config):
            yield (
                f"{place}: teacher.kind = 'ema' begins as the weights of student.model, not as those of the stage "
                "before; let it teach from the first stage on, with the same keys"
            )
        origin = _origin(first.teacher)
        # What a cache was made of is told by its files alone.
        if made_of_teacher and _origin(config.teacher) not in (origin, None):
            yield (
                f"{place}: its teacher is {shown(_origin(config.teacher))}, but the student is made of the layers of "
                f"{shown(origin)}; a run with several teachers needs student.model"
            )
        if stage.keep_optimizer and index == 0:
            yield f"stages.0.keep_optimizer: {stage.name!r} is the first stage; there is nothing to keep"
        if stage.keep_optimizer and config.optim.implementation != "torch":
            yield f"{place}: keep_optimizer needs optim.implementation = 'torch'"


def _origin(teacher: TeacherConfig) -> str | None:
    """The model whose layers a student without one of its own is made of: of several teachers the first."""
    if isinstance(teacher, MixtureTeacherConfig):
        return _origin(teacher.members[0].teacher)
    return getattr(teacher, "model", None)


def nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optim.lr": 1}` and `{"optim": {"lr": 1}}` are the same; of two that meet, the later one wins."""
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        first, dot, rest = key.partition(".")
        own = {rest: value} if dot else value
        if isinstance(own, Mapping):
            own = nested(own)
            held = tree.get(first)
            own = _merged(held, own) if isinstance(held, dict) else own
        tree[first] = own
    return tree


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        held = merged.get(key)
        if isinstance(value, Mapping) and isinstance(held, Mapping) and not _other_kind(held, value):
            merged[key] = _merged(held, value)
        else:
            merged[key] = value
    return merged


def _other_kind(held: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return any(name in value and value[name] != held.get(name) for name in _KINDS)


def _leaves(tree: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
