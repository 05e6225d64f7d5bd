"""A running service for each test that asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from service_databases import database_url, postgresql  # noqa: F401 - fixtures
from service_fakes import FakeExecutor, RunningService, make_settings, running_service, succeeding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A service without tokens, whose probes succeed within milliseconds."""
    with running_service(make_settings(tmp_path), executor=FakeExecutor(succeeding)) as running:
        yield running
