"""Fixtures of the fault tests."""

from collections.abc import Iterator

import pytest
from whole_jobs import JobServer


@pytest.fixture(scope="session")
def job_server() -> Iterator[JobServer]:
    """Starts whole jobs in a second instead of ten."""
    server = JobServer()
    yield server
    server.close()
