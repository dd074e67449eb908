"""Where phases begin and end, and what is frozen in them."""

from types import SimpleNamespace

import pytest

from largekd.config.freezing import FreezingConfig
from largekd.config.staging import Stage
from largekd.contracts import Progress
from largekd.distillation.phases import frozen_in, plan_phases
from largekd.errors import CheckpointError, ConfigError


def stage(index, freezing=None):
    return Stage(index=index, name=f"s{index}", config=SimpleNamespace(freezing=freezing), keep_optimizer=index == 1)


def frozen(depth=6, **options):
    freezing = FreezingConfig(**options)
    return [frozen_in(freezing, part=part, depth=depth).layers for part in range(freezing.parts)]


def test_blocks_of_layers_freeze_and_thaw_from_either_end():
    assert frozen(parts=3) == [(), (0, 1), (0, 1, 2, 3)]
    assert frozen(parts=3, order="top_down") == [(), (4, 5), (2, 3, 4, 5)]
    assert frozen(parts=3, mode="unfreeze") == [(2, 3, 4, 5), (4, 5), ()]
    assert frozen(parts=3, mode="unfreeze", order="top_down") == [(0, 1, 2, 3), (0, 1), ()]
    assert [len(layers) for layers in frozen(parts=4, depth=30)] == [0, 7, 15, 22]


def test_the_look_up_follows_the_lowest_block():
    for embeddings in (True, False):
        freezing = FreezingConfig(parts=2, embeddings=embeddings)
        assert [frozen_in(freezing, part=part, depth=2).embeddings for part in (0, 1)] == [False, embeddings]
    above = frozen_in(FreezingConfig(parts=2, order="top_down"), part=1, depth=4)
    assert above.layers == (2, 3) and not above.embeddings


def test_phases_divide_their_stage_and_belong_to_its_schedule():
    freezing = FreezingConfig(parts=3, at=(0.2, 0.5))
    phases = plan_phases([stage(0), stage(1, freezing), stage(2)], steps=[5, 10, 3], depth=6)
    assert [(phase.first, phase.end) for phase in phases] == [(0, 5), (5, 7), (7, 10), (10, 15), (15, 18)]
    assert [phase.begins_stage for phase in phases] == [True, True, False, False, True]
    assert [phase.ends_stage for phase in phases] == [True, False, False, True, True]
    assert [phase.keep_optimizer for phase in phases] == [False, True, True, True, False]
    progress = phases[2].enter(Progress(step=8), total=18)
    assert (progress.stage_step, progress.stage_length, progress.last, progress.max_steps) == (3, 10, 10, 18)


def test_a_step_outside_of_its_phase_is_refused():
    phase, last = plan_phases([stage(0), stage(1)], steps=[5, 4], depth=6)
    with pytest.raises(CheckpointError, match="may not change its length on resume"):
        phase.enter(Progress(step=6), total=9)
    with pytest.raises(CheckpointError, match="now has the steps 5 to 9"):
        last.enter(Progress(step=4), total=9)


def test_the_last_phase_may_be_over():
    *_, last = plan_phases([stage(0), stage(1)], steps=[5, 4], depth=6)
    progress = last.enter(Progress(step=11), total=9)
    assert progress.step == 11 > progress.last == progress.max_steps == 9


@pytest.mark.parametrize(("parts", "steps", "key"), [(7, 100, "freezing.parts = 7"), (3, 2, "without a step")])
def test_too_many_parts_are_refused(parts, steps, key):
    with pytest.raises(ConfigError, match=key):
        plan_phases([stage(0, FreezingConfig(parts=parts))], steps=[steps], depth=6)
