"""A teacher that was loaded to be measured is freed before the student is filled."""

import weakref

import pytest

from largekd.distillation.calibrate import Calibration


class Cyclic:
    """Like a sharded model: only a collection frees it."""

    def __init__(self):
        self.self = self


def calibration(decoder):
    return Calibration(None, sources=None, rows=None, placements=None, decoder=decoder, ranks=None)


def test_a_loaded_teacher_is_freed(monkeypatch):
    alive = []

    def loaded(self):
        teacher = Cyclic()
        alive.append(weakref.ref(teacher))
        return teacher

    monkeypatch.setattr(Calibration, "_loaded", loaded)
    measures = calibration(None)
    assert measures._teacher is alive[0]()
    measures.release()
    assert alive[0]() is None
    measures.release()
    assert len(alive) == 1


def test_a_teacher_that_the_run_goes_on_with_stays(monkeypatch):
    monkeypatch.setattr(Calibration, "_loaded", lambda self: pytest.fail("nothing is to be loaded"))
    teacher = Cyclic()
    measures = calibration(teacher)
    assert measures._teacher is teacher
    measures.release()
    assert measures._teacher is teacher
