"""Which adapters a run leaves: one where all clients end with the same, else each its own."""

from pathlib import Path
from typing import Any

import pytest

from lesft.errors import InternalError
from lesft_testbed.adapters import gather_adapters
from lesft_testbed.settings import RunSettings

CLIENTS = ("client-0", "client-1")


def gather(output: Path, digests: str, **settings: Any) -> list[str]:
    """Of clients that held the whole model, each with a file that holds its own name."""
    for name in CLIENTS:
        folder = output / "state" / name / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(name)
    run = RunSettings(output=output, method="fedavg", clients=2, **settings)
    results = [{"adapter_sha256": digest} for digest in digests]
    return gather_adapters(run, lambda name: output / "state" / name, CLIENTS, results)


def test_equal_adapters_are_one(tmp_path: Path) -> None:
    assert gather(tmp_path, "aa") == ["adapter"]
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["adapter_config.json"]


def test_adapters_that_must_be_equal_and_are_not_are_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"adapters differ after the last aggregation: a, b$"):
        gather(tmp_path, "ab")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("settings", [{"aggregate": False}, {"personal_layers": (0,)}])
def test_clients_that_keep_something_to_themselves_leave_an_adapter_each(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert gather(tmp_path, "ab", **settings) == ["adapter/client-0", "adapter/client-1"]
    for name in CLIENTS:
        assert (tmp_path / "adapter" / name / "adapter_config.json").read_text() == name
