"""The tiny model that every server of these tests serves, and a run of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import save_tiny_model
from tests.server.harness import Snapshot, snapshot
from tests.server.mid_run import MidRun, starting_mid_run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mid_run(model: Path, tmp_path: Path) -> Iterator[MidRun]:
    with starting_mid_run(model, tmp_path) as started:
        yield started


@pytest.fixture(scope="session")
def after_round_0(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The model after the first round of such a run that nothing disturbs."""
    with starting_mid_run(model, tmp_path_factory.mktemp("undisturbed")) as started:
        started.end_round()
        return snapshot(started.server)
