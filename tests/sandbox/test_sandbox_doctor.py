"""The doctor says whether programs can be isolated, and what to install."""

import doctor
import pytest

from largekd.sandbox import availability


def test_the_doctor_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    availability._tried.cache_clear()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (found,) = doctor._sandbox()
    availability._tried.cache_clear()
    assert (found.mark, found.remedy) == ("note", "apt-get install bubblewrap")
    assert "will be refused: bwrap not found" in found.text


@pytest.mark.usefixtures("isolated")
def test_the_doctor_tries_it() -> None:
    assert [found.mark for found in doctor._sandbox()] == ["ok"]
