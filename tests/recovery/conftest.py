"""One zygote, one model and one undisturbed run for all tests of recovery."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.harness import save_model_with_tokenizer
from tests.recovery.harness import Outcome, Zygote, new_run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="session")
def undisturbed(zygote: Zygote, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with new_run(zygote, tmp_path_factory.mktemp("undisturbed"), model) as run:
        run.start_all()
        return run.finish()
